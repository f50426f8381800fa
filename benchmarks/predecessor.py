"""The predecessor's way of computing a micro-step, to measure against. Nothing in janus_cluster uses it.

Its costs are rebuilt, its mistakes are not: frame order, samples' memories and loss are ours, so that both ways must
give the same loss on the same pixels. What it does as the predecessor does:
  VGGT      a submodule of the engine, one frame at a time with keys and values kept, a module for every activation and
            dropout as published (19 calls a block), the largest position read back for each rotary embedding
  ViT       one attention call a window, positions worked out on the device for every batch
  head      logits and fp32 copies of them for all positions, cross-entropy twice
  recompute every language layer and every vision block
  pixels    floats of a white square from a copied image processor, a copied tokenizer for each sample
  ZeRO-3    the JSON that Qwen's fine-tuning scripts ship, its `auto` filled in as transformers does
It leaves out the last pair of VGGT's blocks, which the predecessor ran in vain: our aggregator has none.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2VLImageProcessorPil
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention

from janus_cluster.janusvln import loss as losses
from janus_cluster.janusvln.data.dataset import NavigationDataset
from janus_cluster.janusvln.data.images import load_frame
from janus_cluster.janusvln.model import pixels
from janus_cluster.janusvln.model.janus import JanusModel, JanusOutput
from janus_cluster.janusvln.model.vggt import Aggregator, Attention, Block, Mlp, RopeTable
from janus_cluster.janusvln.model.vision import use_grouped_attention
from janus_cluster.job.schema import Data
from janus_cluster.modelspec.networks import VggtConfig

KeysAndValues = tuple[Tensor, Tensor]


# Of the predecessor's 7B network with VGGT-1B inside.
OLD_PARAMETERS = 9.2e9


def old_zero3_config(hidden_size: int, num_parameters: int) -> dict[str, Any]:
    """zero_optimization of the predecessor's JSON for a network of that size.

    What it counts in parameters is scaled down with the network: 1e9 of a network of a few million would never be
    reached, and DeepSpeed's scan over that distance would take minutes at each new order of modules.
    """
    billion = round(1e9 * min(1.0, num_parameters / OLD_PARAMETERS))
    return {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1_000_000_000,
        "reduce_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
        "stage3_max_live_parameters": billion,
        "stage3_max_reuse_distance": billion,
        "stage3_gather_16bit_weights_on_model_save": True,
    }


class _Rope(nn.Module):
    """Turns tokens by their positions; reads the largest position back, as the published module does."""

    def __init__(self, base: float) -> None:
        super().__init__()
        self.base = base

    def forward(self, x_SHND: Tensor, positions_N2: Tensor) -> Tensor:
        largest = int(positions_N2.max()) + 1
        half = x_SHND.shape[-1] // 2
        frequencies = 1.0 / self.base ** (torch.arange(0, half, 2, device=x_SHND.device, dtype=torch.float32) / half)
        steps = torch.arange(largest, device=x_SHND.device, dtype=torch.float32)
        angles = torch.outer(steps, frequencies).repeat(1, 2).to(x_SHND.dtype)
        turned = []
        for part, position in zip(x_SHND.chunk(2, dim=-1), positions_N2.unbind(-1), strict=True):
            cos, sin = F.embedding(position, angles.cos()), F.embedding(position, angles.sin())
            a, b = part.chunk(2, dim=-1)
            turned.append(part * cos + torch.cat((-b, a), dim=-1) * sin)
        return torch.cat(turned, dim=-1)


class _SteppedAttention(Attention):
    def __init__(self, dim: int, num_heads: int, rope_base: float) -> None:
        super().__init__(dim, num_heads)
        self.rope = _Rope(rope_base)
        self.proj_drop = nn.Dropout(0.0)

    def forward(
        self, x_1NC: Tensor, positions_N2: Tensor, past: KeysAndValues | None, keep: bool
    ) -> tuple[Tensor, KeysAndValues | None]:
        qkv = self.qkv(x_1NC).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.rope(self.q_norm(q), positions_N2).to(v.dtype), self.rope(self.k_norm(k), positions_N2).to(v.dtype)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2))), (k, v) if keep else None


class _SteppedMlp(Mlp):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__(dim, hidden_dim)
        self.act = nn.GELU()
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))  # type: ignore[no-any-return]


class _SteppedBlock(Block):
    def __init__(self, config: VggtConfig, *, over_frames: bool) -> None:
        super().__init__(config.embed_dim, config.num_heads, config.mlp_ratio, over_frames=over_frames)
        self.attn = _SteppedAttention(config.embed_dim, config.num_heads, config.rope_base)
        self.mlp = _SteppedMlp(config.embed_dim, config.mlp_ratio * config.embed_dim)

    def forward(  # type: ignore[override]
        self, x_1NC: Tensor, positions_N2: Tensor, past: KeysAndValues | None = None
    ) -> tuple[Tensor, KeysAndValues | None]:
        mixed, kept = self.attn(self.norm1(x_1NC), positions_N2, past, self.over_frames)
        x = x_1NC + self.ls1(mixed)
        return x + self.ls2(self.mlp(self.norm2(x))), kept


class FrameByFrameAggregator(Aggregator):
    """Our aggregator's weights, one frame after the other."""

    def __init__(self, source: Aggregator) -> None:
        super().__init__(source.config)
        for blocks, over_frames in ((self.frame_blocks, False), (self.global_blocks, True)):
            for i in range(len(blocks)):
                blocks[i] = _SteppedBlock(source.config, over_frames=over_frames)
        self.to(source.dtype).load_state_dict(source.state_dict())
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def forward(self, frames_S3HW: Tensor) -> Tensor:
        """As Aggregator.forward."""
        grid_h, grid_w = (side // self.config.patch_size for side in frames_S3HW.shape[-2:])
        positions = F.pad(
            torch.cartesian_prod(
                torch.arange(grid_h, device=frames_S3HW.device), torch.arange(grid_w, device=frames_S3HW.device)
            )
            + 1,
            (0, 0, self.config.num_special_tokens, 0),
        )
        past: list[KeysAndValues | None] = [None] * len(self.global_blocks)
        for number in range(len(frames_S3HW)):
            x = self.with_special_tokens(self.patch_tokens(frames_S3HW[number : number + 1]), first_index=number)
            for i, (frame_block, global_block) in enumerate(self.block_pairs()):
                in_frame, _ = frame_block(x, positions)
                x, past[i] = global_block(in_frame, positions, past[i])  # type: ignore[arg-type]
        return self.feature_map(in_frame[0], x[0], grid_h=grid_h, grid_w=grid_w)

    def rope_table(self, grid_h: int, grid_w: int) -> RopeTable:
        raise NotImplementedError("each block has a module for its positions")


class SwitchableModel(JanusModel):
    """JanusModel whose parts compute as the predecessor's where the switches are set."""

    head_on_all_positions = False
    plain_vision = False

    def put_vggt_inside(self, *, frame_by_frame: bool) -> None:
        """VGGT is a submodule from now on: the engine hooks it, shards it and keeps it in checkpoints."""
        self.add_module("vggt_inside", FrameByFrameAggregator(self.vggt) if frame_by_frame else self.vggt)

    def use_plain_vision(self) -> None:
        """Windows one by one, and everything that follows from grids and ids worked out on the device each time."""
        self.plain_vision = True
        for block in self.model.visual.blocks:
            block.attn.__class__ = Qwen2_5_VLVisionAttention

    def use_own_vision(self) -> None:
        """Windows of one length together again."""
        self.plain_vision = False
        use_grouped_attention(self.model.visual)

    def remember(self, frames_S3HW: Tensor) -> Tensor:
        inside = self._modules.get("vggt_inside")
        return super().remember(frames_S3HW) if inside is None else pixels.merge_groups(inside(frames_S3HW))

    def forward(self, *, pixel_values: Tensor | None = None, **batch: Any) -> Any:
        """As JanusModel.forward; with `pixel_values` the frames are floats in [0, 1] and the patches come ready."""
        if pixel_values is None and not self.plain_vision:
            return super().forward(**batch)
        text = {name: batch.pop(name) for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
        frames, grid = batch.pop("frames"), batch.pop("image_grid_thw")
        if pixel_values is None:
            pixel_values = torch.cat([pixels.qwen_patches(sample) for sample in frames])
            frames = [pixels.unit_frames(sample) for sample in frames]
        if self.plain_vision:
            embeds = self.model.get_image_features(pixel_values, grid, return_dict=True).pooler_output
            memories = self.merge_memories([self.remember(sample) for sample in frames])
            fused = self.fuse(embeds, memories, [len(sample) for sample in frames])
            hidden = _transformers_hidden_states(self, fused, image_grid_thw=grid, **text)
            return self.judge_hidden(hidden, attention_mask=text["attention_mask"], **batch)
        layout = self.read_layout(image_grid_thw=grid, labels=batch["labels"], **text)
        fused = self.encode_images(pixel_values, grid, frames)
        hidden = self.hidden_states(fused, layout, input_ids=text["input_ids"], image_grid_thw=grid)
        return self.judge_hidden(
            hidden, attention_mask=text["attention_mask"], label_positions=layout.label_positions_M, **batch
        )

    def judge_hidden(self, hidden_BLH: Tensor, **batch: Any) -> JanusOutput:
        if not self.head_on_all_positions:
            return super().judge_hidden(hidden_BLH, **batch)
        labels, weights, segments = batch["labels"], batch["loss_weights"], batch["segment_ids"]
        logits_BLV = self.lm_head(hidden_BLH)
        # The model class's own loss, which the weighted one then replaces.
        self.loss_function(logits=logits_BLV, labels=labels, vocab_size=self.config.text_config.vocab_size)
        mask = losses.label_mask(labels)
        targets, weights = labels[:, 1:].masked_fill(~mask, 0), weights[:, 1:] * mask
        text = losses.text_terms(
            logits_BLV[:, :-1].flatten(0, 1), targets.flatten(), weights.flatten(), segments[:, 1:].flatten()
        )
        action_logits = self.action_logits(hidden_BLH, labels, batch["attention_mask"])
        total, text_loss, action_loss = losses.combine(
            text,
            losses.action_loss_sum(action_logits, batch["actions"]),
            losses.action_count(batch["actions"]),
            action_loss_weight=batch.get("action_loss_weight", 1.0),
            denominator=batch.get("loss_denominator"),
        )
        return JanusOutput(
            loss=total,
            action_logits=action_logits.detach(),
            text_loss=text_loss.detach(),
            action_loss=action_loss.detach(),
            segment_loss_sum=text.segment_loss_sum,
            segment_weight_sum=text.segment_weight_sum,
        )


class FloatDataset:
    """The predecessor's pixels of the same samples: white squares as floats, patches by a copied image processor.

    Ids, labels and weights come from our dataset, so that the losses can be compared; the copy of the tokenizer is
    made all the same.
    """

    def __init__(self, ours: NavigationDataset, *, tokenizer: Any, data: Data) -> None:
        self._ours, self._tokenizer, self._data = ours, tokenizer, data
        self._processor = Qwen2VLImageProcessorPil()

    def __getitem__(self, index: int) -> dict[str, Any]:
        prepared = self._ours[index]
        copy.deepcopy(self._tokenizer)
        paths = self._ours.samples[index].frames[-len(prepared["frames"]) :]
        floats = [torch.from_numpy(load_frame(path, self._data)).float().div(255) for path in paths]
        prepared["frames"] = torch.stack(floats)
        prepared["pixel_values"] = torch.cat([self._patches(frame) for frame in floats])
        return prepared

    def _patches(self, frame_3HW: Tensor) -> Tensor:
        processor = copy.deepcopy(self._processor)
        height, width = (side // 28 * 28 for side in frame_3HW.shape[-2:])
        sides = {"shortest_edge": height * width, "longest_edge": height * width}
        seen = processor(frame_3HW[:, :height, :width].numpy(), return_tensors="pt", do_rescale=False, size=sides)
        return seen["pixel_values"]  # type: ignore[no-any-return]


def collate_floats(samples: Sequence[dict[str, Any]], batch: dict[str, Any]) -> dict[str, Any]:
    """`batch` as our collate made it, with the ready patches beside it."""
    return batch | {"pixel_values": torch.cat([sample["pixel_values"] for sample in samples])}


def _transformers_hidden_states(
    model: JanusModel, image_embeds: Sequence[Tensor], *, input_ids: Tensor, image_grid_thw: Tensor, **inputs: Any
) -> Tensor:
    """Last hidden states with positions and placeholders worked out by transformers, on the device."""
    out = model.model(
        input_ids=input_ids,
        image_grid_thw=image_grid_thw,
        mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=tuple(image_embeds))},
        use_cache=False,
        **inputs,
    )
    return out.last_hidden_state  # type: ignore[no-any-return]
