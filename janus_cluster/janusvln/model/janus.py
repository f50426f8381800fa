"""JanusVLN's network: Qwen2.5-VL that sees a spatial memory, and a head that names the action.

Shape legend: B samples, S frames of a sample, L positions, H hidden size, T image tokens of a frame, C width of VGGT.

What VGGT remembers of a sample's frames is added to the embeddings of every frame of that sample; the language model
then runs as transformers wrote it (`mm_encoder_outputs` takes the fused embeddings).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.utils import ModelOutput

from janus_cluster.errors import UsageError
from janus_cluster.janusvln import loss as losses
from janus_cluster.janusvln.model import pixels
from janus_cluster.janusvln.model.layout import TextLayout, read_layout
from janus_cluster.janusvln.model.vggt import Aggregator
from janus_cluster.janusvln.model.vision import plan_vision, use_grouped_attention, use_patch_product
from janus_cluster.modelspec.frames import qwen_grid
from janus_cluster.modelspec.networks import VggtConfig
from janus_cluster.modelspec.tied_head import resolve_head
from janus_cluster.modelspec.weight_names import OWN_PREFIXES

KEYS_SHOWN = 5


class JanusConfig(Qwen2_5_VLConfig):  # type: ignore[misc]
    """Qwen2.5-VL's configuration with JanusVLN's part beside it; plain Qwen2.5-VL loads the same file."""

    lam: float = 0.2
    reference_frame: str = "first"
    vggt_merger_hidden_dim: int = 4096
    action_head_hidden_dim: int = 512
    num_actions: int = 4
    vggt_config: dict[str, Any] | None = None

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        """A folder's config.json, untied where the weights beside it are: one network for all who read the folder."""
        values, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return resolve_head(values, Path(pretrained_model_name_or_path)), rest

    @property
    def vggt(self) -> VggtConfig:
        """The aggregator's dimensions; VGGT-1B's where the file names none (published checkpoints)."""
        return VggtConfig.from_dict(self.vggt_config or {})


@dataclass
class JanusOutput(ModelOutput):  # type: ignore[misc]
    """Everything but `loss` is detached. `text_loss` and `action_loss` are the two terms, without d.

    A segment's loss is segment_loss_sum / segment_weight_sum, after adding up ranks and micro-steps.
    """

    loss: Tensor | None = None
    action_logits: Tensor | None = None
    text_loss: Tensor | None = None
    action_loss: Tensor | None = None
    segment_loss_sum: Tensor | None = None
    segment_weight_sum: Tensor | None = None


class SpatialMerger(nn.Module):
    """2×2 groups of VGGT features -> one vector of the language model's width each."""

    def __init__(self, feature_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.ln_q = nn.RMSNorm(feature_dim, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(feature_dim * pixels.MERGE_SIZE**2, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, out_dim)
        )

    def forward(self, groups_T4C: Tensor) -> Tensor:
        return self.mlp(self.ln_q(groups_T4C).flatten(-2))  # type: ignore[no-any-return]


class JanusModel(Qwen2_5_VLForConditionalGeneration):  # type: ignore[misc]
    """Qwen2.5-VL + VGGT merger + action head. VGGT itself is attached, never a submodule."""

    config_class = JanusConfig
    # Published checkpoints contain all of VGGT, with heads that are not used.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^vggt\."]

    def __init__(self, config: JanusConfig) -> None:
        super().__init__(config)
        hidden = config.text_config.hidden_size
        self.merger = SpatialMerger(config.vggt.feature_dim, config.vggt_merger_hidden_dim, hidden)
        width = config.action_head_hidden_dim
        self.action_head = nn.Sequential(
            nn.Linear(hidden, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, config.num_actions)
        )
        # A tuple keeps VGGT out of the module tree: no ZeRO hooks (11,936 calls a pass), optimizer state or checkpoint.
        self._vggt: tuple[Aggregator, ...] = ()
        use_grouped_attention(self.model.visual)
        use_patch_product(self.model.visual)
        self.post_init()

    @classmethod
    def from_pretrained(cls, folder: str | Path, *args: Any, **kwargs: Any) -> Any:
        """A model with every weight but a new merger or action head from `folder`. VGGT is not attached yet.

        Raises: UsageError if weights of Qwen2.5-VL are missing; transformers alone would fill them with noise.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(folder, *args, output_loading_info=True, **kwargs)
        missing = sorted(key for key in info["missing_keys"] if not key.startswith(OWN_PREFIXES))
        if missing:
            shown = ", ".join(missing[:KEYS_SHOWN])
            raise UsageError(
                f"{folder}: {len(missing)} weights of Qwen2.5-VL are missing: {shown}",
                hint="model.path must be a complete Qwen2.5-VL or JanusVLN folder (config.json, *.safetensors)",
            )
        return (model, info) if wants_info else model

    def attach_vggt(self, aggregator: Aggregator) -> None:
        """Take the spatial memory from `aggregator`. Raises: ValueError if its width does not fit."""
        if aggregator.config.feature_dim != self.config.vggt.feature_dim:
            raise ValueError(
                f"VGGT gives {aggregator.config.feature_dim} features, the merger takes {self.config.vggt.feature_dim}"
            )
        self._vggt = (aggregator,)

    @property
    def vggt(self) -> Aggregator:
        """The attached aggregator. Raises: ValueError if there is none."""
        if not self._vggt:
            raise ValueError("no VGGT attached: call attach_vggt() after from_pretrained()")
        return self._vggt[0]

    def remember(self, frames_S3HW: Tensor) -> Tensor:
        """The spatial memory of one sample, before the merger, without gradient.

        Shapes: frames [S, 3, H, W] in [0, 1], oldest first; [T, 4, 2C] out, in Qwen's 2×2 order.
        `reference_frame: last` turns the frames round, so that the oldest supplies the memory (the predecessor's way).
        """
        aggregator = self.vggt
        if aggregator.device != frames_S3HW.device:
            aggregator.to(frames_S3HW.device)
        ordered = frames_S3HW.flip(0) if self.config.reference_frame == "last" else frames_S3HW
        return pixels.merge_groups(aggregator(ordered))

    def fuse(
        self, image_embeds: Sequence[Tensor], memories: Sequence[Tensor], frames_per_sample: Sequence[int]
    ) -> tuple[Tensor, ...]:
        """Each image's embeddings plus λ × its own sample's memory.

        Shapes: ΣS × [T, H] in batch order, B × [T, H], B counts; ΣS × [T, H] out. Samples may differ in S and T.
        Raises: ValueError if an image has not as many tokens as its sample's memory.
        """
        owners = [memory for memory, n in zip(memories, frames_per_sample, strict=True) for _ in range(n)]
        for image, memory in zip(image_embeds, owners, strict=True):
            if image.shape != memory.shape:
                raise ValueError(f"an image has {list(image.shape)} embeddings, its memory {list(memory.shape)}")
        return tuple(
            image + self.config.lam * memory.to(image.dtype) for image, memory in zip(image_embeds, owners, strict=True)
        )

    def merge_memories(self, memories: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """B × [T, 4, 2C] -> B × [T, H], in one call, so that every rank runs the merger once a step."""
        dtype = next(self.merger.parameters()).dtype
        merged = self.merger(torch.cat(list(memories)).to(dtype))
        return merged.split([len(memory) for memory in memories])  # type: ignore[no-any-return]

    def encode_images(
        self,
        pixel_values: Tensor,
        image_grid_thw: Tensor,
        vggt_frames: Sequence[Tensor],
        memories: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """Fused embeddings of every image, in batch order; VGGT runs only where `memories` are not given.

        Shapes: [patches, 1176], [ΣS, 3], B × [S, 3, H, W] in [0, 1], B × [T, 4, 2C] as `remember` gives them;
                ΣS × [T, H] out. A grid on the host spares a wait for the device.
        """
        grid = image_grid_thw.cpu()
        plan = plan_vision(self.model.visual, grid, pixel_values.device)
        image_embeds = self.model.get_image_features(pixel_values, grid, return_dict=True, **plan).pooler_output
        if memories is None:
            memories = [self.remember(frames) for frames in vggt_frames]
        return self.fuse(image_embeds, self.merge_memories(memories), [len(frames) for frames in vggt_frames])

    def read_layout(
        self,
        input_ids: Tensor,
        *,
        image_grid_thw: Tensor,
        mm_token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> TextLayout:
        """Positions of the batch's images and labels: the step's one wait for the device, before its work begins."""
        is_image = input_ids == self.config.image_token_id if mm_token_type_ids is None else mm_token_type_ids == 1
        return read_layout(
            input_ids,
            is_image_BL=is_image,
            image_grid_thw=image_grid_thw.cpu(),
            attention_mask_BL=attention_mask,
            labels_BL=labels,
            position_ids=position_ids,
        )

    def hidden_states(
        self,
        image_embeds: Sequence[Tensor],
        layout: TextLayout | None = None,
        /,
        *,
        input_ids: Tensor,
        image_grid_thw: Tensor,
        **inputs: Any,
    ) -> Tensor:
        """Last hidden states [B, L, H], after the final norm. `layout` as read_layout gives it for these inputs.

        Raises: ValueError if there are not as many image tokens as embeddings.
        """
        if layout is None:
            layout = self.read_layout(input_ids, image_grid_thw=image_grid_thw, **inputs)
        images_NH = torch.cat(list(image_embeds))
        if len(images_NH) != len(layout.image_positions_N):
            raise ValueError(f"{len(layout.image_positions_N)} image tokens in the text, {len(images_NH)} embeddings")
        text_BLH = self.get_input_embeddings()(input_ids)
        # index_copy: its backward picks rows by number; that of masked_scatter would ask the device how many.
        flat_NH = text_BLH.flatten(0, 1).index_copy(0, layout.image_positions_N, images_NH.to(text_BLH.dtype))
        out = self.model.language_model(
            inputs_embeds=flat_NH.view_as(text_BLH),
            position_ids=layout.position_ids_3BL,
            attention_mask=layout.attention_mask_BL,
            use_cache=False,
        )
        return out.last_hidden_state  # type: ignore[no-any-return]

    def action_logits(self, hidden_BLH: Tensor, labels_BL: Tensor | None, attention_mask_BL: Tensor | None) -> Tensor:
        """[B, actions] in fp32, read just before the first label, or at the last position where there are no labels."""
        rows = torch.arange(len(hidden_BLH), device=hidden_BLH.device)
        if labels_BL is not None:
            at = losses.label_mask(labels_BL).int().argmax(dim=1)
        elif attention_mask_BL is not None:
            at = hidden_BLH.shape[1] - 1 - attention_mask_BL.int().flip(1).argmax(dim=1)
        else:
            at = torch.full_like(rows, hidden_BLH.shape[1] - 1)
        return self.action_head(hidden_BLH[rows, at]).float()  # type: ignore[no-any-return]

    def label_logits(self, hidden_BLH: Tensor, labels_BL: Tensor) -> Tensor:
        """[M, vocabulary] at the label positions only (~160 of ~4,000), row-major over the batch."""
        return self.lm_head(hidden_BLH[:, :-1][losses.label_mask(labels_BL)])  # type: ignore[no-any-return]

    def forward(  # noqa: PLR0917 — the batch's keys
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        segment_ids: Tensor | None = None,
        actions: Tensor | None = None,
        frames: Sequence[Tensor] | None = None,
        image_grid_thw: Tensor | None = None,
        position_ids: Tensor | None = None,
        memories: Sequence[Tensor] | None = None,
        action_loss_weight: float = 1.0,
        loss_denominator: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """One training or evaluation pass over a batch; without `frames` this is plain Qwen2.5-VL (decoding steps).

        Shapes:  text keys [B, L]; actions [B], negative = none; frames B × uint8 [S, 3, H, W], oldest first, current
                 last; image_grid_thw [ΣS, 3]; loss_denominator [2] fp32 (see loss.combine); memories, for evaluation:
                 B × [T, 4, 2C] from streaming.StreamingMemory and pixels.merge_groups, then VGGT does not run.
        Returns: JanusOutput; without labels only action_logits.
        Raises:  ValueError on a batch that is not consistent.
        """
        text_inputs = {
            "attention_mask": attention_mask,
            "mm_token_type_ids": mm_token_type_ids,
            "position_ids": position_ids,
        }
        if frames is None:
            return super().forward(
                input_ids=input_ids, labels=labels, image_grid_thw=image_grid_thw, **text_inputs, **kwargs
            )
        if input_ids is None or image_grid_thw is None:
            raise ValueError("a batch with frames needs input_ids and image_grid_thw")
        _check_batch(input_ids, frames, image_grid_thw)
        # The grid follows from the frames' shapes, which the host knows.
        grid = torch.tensor([qwen_grid(f.shape[3], f.shape[2]) for f in frames for _ in range(len(f))])
        layout = self.read_layout(input_ids, image_grid_thw=grid, labels=labels, **text_inputs)
        patches = torch.cat([pixels.qwen_patches(sample) for sample in frames])
        unit_frames = [pixels.unit_frames(sample) for sample in frames]
        fused = self.encode_images(patches, grid, unit_frames, memories)
        hidden = self.hidden_states(fused, layout, input_ids=input_ids, image_grid_thw=grid)
        return self.judge_hidden(
            hidden,
            label_positions=layout.label_positions_M,
            attention_mask=attention_mask,
            labels=labels,
            loss_weights=loss_weights,
            segment_ids=segment_ids,
            actions=actions,
            action_loss_weight=action_loss_weight,
            loss_denominator=loss_denominator,
        )

    def judge_hidden(
        self,
        hidden_BLH: Tensor,
        *,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        loss_weights: Tensor | None = None,
        segment_ids: Tensor | None = None,
        actions: Tensor | None = None,
        action_loss_weight: float = 1.0,
        loss_denominator: Tensor | None = None,
        label_positions: Tensor | None = None,
    ) -> JanusOutput:
        """Action logits, and the losses where there are labels. Arguments as in `forward`.

        `label_positions` as TextLayout holds them; without them the device is asked where the labels are.
        """
        action_logits = self.action_logits(hidden_BLH, labels, attention_mask)
        if labels is None:
            return JanusOutput(action_logits=action_logits.detach())
        if label_positions is None:
            label_positions = F.pad(losses.label_mask(labels), (0, 1)).flatten().nonzero().squeeze(1)
        at_label = label_positions + 1
        weights = torch.ones_like(labels, dtype=torch.float32) if loss_weights is None else loss_weights
        segments = torch.zeros_like(labels) if segment_ids is None else segment_ids
        actions = labels.new_full((len(labels),), losses.IGNORE_INDEX) if actions is None else actions
        logits_MV = self.lm_head(hidden_BLH.flatten(0, 1).index_select(0, label_positions))
        text = losses.text_terms(logits_MV, *(x.flatten()[at_label] for x in (labels, weights, segments)))
        total, text_loss, action_loss = losses.combine(
            text,
            losses.action_loss_sum(action_logits, actions),
            losses.action_count(actions),
            action_loss_weight=action_loss_weight,
            denominator=loss_denominator,
        )
        return JanusOutput(
            loss=total,
            action_logits=action_logits.detach(),
            text_loss=text_loss.detach(),
            action_loss=action_loss.detach(),
            segment_loss_sum=text.segment_loss_sum,
            segment_weight_sum=text.segment_weight_sum,
        )


def _check_batch(input_ids: Tensor, frames: Sequence[Tensor], image_grid_thw: Tensor) -> None:
    num_images = sum(len(sample) for sample in frames)
    if len(frames) != len(input_ids) or num_images != len(image_grid_thw):
        raise ValueError(
            f"{len(input_ids)} rows of text, {len(frames)} of frames; {num_images} frames, {len(image_grid_thw)} grids"
        )


# transformers 5 finds the renaming of hub keys by class name: without this line a subclass gets random LLM weights.
register_checkpoint_conversion_mapping(
    JanusModel.__name__, get_checkpoint_conversion_mapping("Qwen2VLForConditionalGeneration"), overwrite=True
)
