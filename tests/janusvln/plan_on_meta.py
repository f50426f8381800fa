"""Networks on torch's meta device, with the operations and bytes of a pass as torch counts them.

Every operator runs with its real shapes, nothing is computed or allocated, so that a 7B network fits a laptop.
Attention goes through the flash kernel that a GPU would take. Each gradient is dropped as soon as it is complete, as a
ZeRO-2 or 3 engine does. Not included: workspaces of kernels (cuBLAS, what a flash kernel's backward pass adds up in
fp32) and the allocator's fragmentation. The tables of the real sizes: docs/decisions/results/plan_counts.txt.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import backward
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.ways import Size
from janus_cluster.janusvln.model.build import mark_trainable, set_recompute
from janus_cluster.janusvln.model.janus import JanusModel
from janus_cluster.janusvln.model.layout import TextLayout, read_layout
from janus_cluster.janusvln.model.lora import add_adapters
from janus_cluster.janusvln.model.pixels import qwen_patches, unit_frames
from janus_cluster.janusvln.model.presets import TokenizerIds, build_config
from janus_cluster.janusvln.model.vggt import Aggregator
from janus_cluster.janusvln.model.vision import plan_vision
from janus_cluster.job.schema import Lora, Model, Training, Tune
from janus_cluster.plan.flops import Flops, Work
from janus_cluster.plan.sample import Sample
from janus_cluster.plan.setup import Setup

META = torch.device("meta")
TINY_IDS = TokenizerIds(
    vocab_size=1024, image_token_id=1001, video_token_id=1003, vision_start_token_id=1000, vision_end_token_id=1002,
    pad_token_id=1004, eos_token_id=1005,
)  # fmt: skip
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention


@contextmanager
def flash_attention() -> Iterator[None]:
    """Attention calls the kernel that a GPU would take; on the meta device torch would take plain products.

    torch's function itself is replaced: a function mode would not reach what is computed again in a backward pass.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any) -> Tensor:
        if attn_mask is not None or options.get("dropout_p"):
            raise ValueError("a mask or dropout: a GPU would not take its flash kernel here")
        causal, scale = bool(options.get("is_causal")), options.get("scale")
        return _FLASH(query, key, value, 0.0, causal, scale=scale)[0]  # type: ignore[no-any-return]

    own = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = own


def _flash_forward(q: Any, k: Any, v: Any, _p: float = 0.0, causal: bool = False, *_: Any, **__: Any) -> float:
    """Two products for every query head; the `sdpa_flop_count` of torch 2.8 takes no grouped heads."""
    batch, heads, queries, width = q
    return 2.0 * batch * heads * queries * k[-2] * (width + v[-1]) / (2 if causal else 1)


def _flash_backward(
    _g: Any, q: Any, k: Any, v: Any, _o: Any, _l: Any, _cq: Any, _ck: Any, _mq: Any, _mk: Any, _p: float, causal: bool,
    *_: Any, **__: Any
) -> float:  # fmt: skip
    return 2 * _flash_forward(q, k, v, causal=causal)


# As plan/flops.py counts: half of a causal square, and nothing for the scores that the backward pass makes again.
AS_PLANNED = {
    torch.ops.aten._scaled_dot_product_flash_attention: _flash_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_backward: _flash_backward,
}


class CountedModel(JanusModel):
    """Takes the layout of its batch as it is given: meta tensors have no values to read it from."""

    ready_layout: TextLayout | None = None

    def read_layout(self, input_ids: Tensor, **_: Any) -> TextLayout:
        if self.ready_layout is None:
            raise ValueError("no layout was given")
        return self.ready_layout


def build_network(size: Size, training: Training) -> CountedModel:
    """The network on the meta device in bf16, VGGT attached, the job's parts learning."""
    config = size.configure(build_config(Model(preset=size.preset), TINY_IDS if size.preset == "tiny" else None))
    with META:
        model = CountedModel._from_config(config, dtype=torch.bfloat16)
        model.attach_vggt(Aggregator(config.vggt).to(torch.bfloat16))
        if training.lora.enabled:
            add_adapters(model, training.lora, seed=0)
    mark_trainable(model, training)
    set_recompute(model, training)
    return model.train()  # type: ignore[no-any-return]


# What learns: as the jobs are shipped, and otherwise.
LEARNS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "ViT too": {"tune": Tune(vision=True)},
    "LoRA": {"lora": Lora(enabled=True)},
}


def training_of(every: int, learns: str = "as shipped") -> Training:
    return Training(gradient_checkpointing=every > 0, gradient_checkpointing_every=max(1, every), **LEARNS[learns])


def make_batch(model: CountedModel, sample: Sample, rows: int) -> dict[str, Any]:
    """`rows` times the sample, on meta; the model has its layout."""
    config = model.config
    image = [config.vision_start_token_id, *[config.image_token_id] * sample.memory_tokens, config.vision_end_token_id]
    ids = torch.tensor([image * sample.frames + [0] * sample.text_tokens] * rows)
    labels = torch.full_like(ids, -100)
    labels[:, -sample.label_tokens :] = 0
    grid = torch.tensor([[1, sample.rows, sample.columns]] * sample.frames * rows)
    layout = read_layout(ids, is_image_BL=ids == config.image_token_id, image_grid_thw=grid, labels_BL=labels)
    model.ready_layout = TextLayout(
        position_ids_3BL=layout.position_ids_3BL.to(META),
        image_positions_N=layout.image_positions_N.to(META),
        label_positions_M=layout.label_positions_M.to(META),
        attention_mask_BL=layout.attention_mask_BL,
    )
    shape = (sample.frames, 3, sample.height, sample.width)
    return {
        "input_ids": ids.to(META),
        "labels": labels.to(META),
        "loss_weights": torch.ones(ids.shape, device=META),
        "segment_ids": torch.ones_like(ids, device=META),
        "actions": torch.ones(rows, dtype=torch.long, device=META),
        "frames": [torch.empty(shape, dtype=torch.uint8, device=META) for _ in range(rows)],
        "image_grid_thw": grid,
    }


@contextmanager
def _counting(found: dict[str, float], part: str, mapping: dict[Any, Any]) -> Iterator[FlopCounterMode]:
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        yield counter
    found[part] = found.get(part, 0.0) + float(counter.get_total_flops())


def count_parts(model: CountedModel, batch: dict[str, Any], *, as_torch: bool = False) -> dict[str, float]:
    """FLOP of every part of one pass over the batch, forward and backward, cut where the parts meet.

    `as_torch`: attention as torch counts it, the whole square and a flash kernel's second look at the scores.
    Returns: the names of plan.flops.Flops, `llm_backward` with what is recomputed, and `whole`: an uncut pass.
    """
    mapping = {} if as_torch else AS_PLANNED
    found: dict[str, float] = {}
    layout = model.read_layout(batch["input_ids"])
    frames, grid = batch["frames"], batch["image_grid_thw"]
    with flash_attention():
        memories = [_count_vggt(model, sample, mapping, found) for sample in frames]
        with _counting(found, "vision", mapping) as counter:
            images = _encode(model, frames, grid)
        # Qwen's own merger runs inside the tower.
        merger = float(sum(counter.get_flop_counts()[_name_of(model.model.visual, "merger")].values()))
        found["vision"] -= merger
        found["mergers"] = merger
        with _counting(found, "mergers", mapping):
            fused = model.fuse(images, model.merge_memories(memories), [len(sample) for sample in frames])
        leaves = [x.detach().requires_grad_(x.requires_grad) for x in fused]
        with _counting(found, "llm_forward", mapping):
            hidden = model.hidden_states(leaves, layout, input_ids=batch["input_ids"], image_grid_thw=grid)
        end = hidden.detach().requires_grad_(hidden.requires_grad)
        with _counting(found, "head", mapping):
            judged = {key: batch[key] for key in ("labels", "loss_weights", "segment_ids", "actions")}
            judged |= {"attention_mask": None, "label_positions": layout.label_positions_M}
            backward([model.judge_hidden(end, **judged).loss])  # type: ignore[arg-type]
        with _counting(found, "llm_backward", mapping):
            backward([hidden], [end.grad])
        with _counting(found, "mergers", mapping):
            backward(fused, [leaf.grad for leaf in leaves])
        model.zero_grad(set_to_none=True)
        with _counting(found, "whole", mapping):
            backward([model(**batch).loss])
    model.zero_grad(set_to_none=True)
    return found


def _count_vggt(model: CountedModel, frames: Tensor, mapping: dict[Any, Any], found: dict[str, float]) -> Tensor:
    """The memory of one sample's frames; DINO, frame blocks and global blocks are counted apart."""
    aggregator = model.vggt
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        memory = model.remember(unit_frames(frames))
    counts = counter.get_flop_counts()
    parts = {
        "dino": [_name_of(aggregator, "patch_embed")],
        "vggt_frame": [_name_of(aggregator, f"frame_blocks.{i}") for i in range(len(aggregator.frame_blocks))],
        "vggt_global": [_name_of(aggregator, f"global_blocks.{i}") for i in range(len(aggregator.global_blocks))],
    }
    for part, modules in parts.items():
        found[part] = found.get(part, 0.0) + float(sum(sum(counts[module].values()) for module in modules))
    return memory


def _name_of(root: nn.Module, path: str) -> str:
    """What FlopCounterMode calls a module below the one that was called first."""
    return f"{type(root).__name__}.{path}"


def _encode(model: CountedModel, frames: Sequence[Tensor], grid: Tensor) -> tuple[Tensor, ...]:
    patches = torch.cat([qwen_patches(sample) for sample in frames])
    plan = plan_vision(model.model.visual, grid, META)
    return model.model.get_image_features(patches, grid, return_dict=True, **plan).pooler_output  # type: ignore[no-any-return]


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every storage that an operator makes, while entered: bytes that live now, and at the fullest moment."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor) and value.device == META:
                self._note(value.untyped_storage())
        return result

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def follow_memory(model: CountedModel, batch: dict[str, Any]) -> dict[str, int]:
    """Bytes of one pass: `vision` and `vggt` at the fullest moment of that part, `kept` after the forward pass, `peak`.

    Weights, their states and the batch are not among them; a gradient is gone as soon as it is complete.
    """
    learning = [p for p in model.parameters() if p.requires_grad]
    handles = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in learning]
    given = [x for value in batch.values() for x in (value if isinstance(value, list) else [value])]
    given += [x for x in vars(model.ready_layout).values() if x is not None]
    weights = [*model.parameters(), *model.buffers(), *model.vggt.parameters(), *model.vggt.buffers()]
    found: dict[str, int] = {}
    with flash_attention(), Allocations([*weights, *given]) as followed:
        # What is cached is made in a first pass.
        backward([model(**batch).loss])
        gc.collect()
        before, followed.peak = followed.now, followed.now
        highest = before

        def enter(*_: Any) -> None:
            nonlocal highest
            highest, followed.peak = max(highest, followed.peak), followed.now

        def leave(part: str) -> None:
            found[part] = max(found.get(part, 0), followed.peak - before)

        for part, module in (("vision", model.model.visual), ("vggt", model.vggt)):
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(lambda *_, part=part: leave(part)))
        loss = model(**batch).loss
        found["kept"] = followed.now - before
        backward([loss])
        found["peak"] = max(highest, followed.peak) - before
    for handle in handles:
        handle.remove()
    return found


def setup_of(every: int, rows: int, learns: str = "as shipped") -> Setup:
    training = training_of(every, learns)
    return Setup(
        nodes=1, ranks_per_node=8, stage=2, offload_optimizer=False, offload_parameters=False, micro_batch=rows,
        accumulation=8, element_bytes=2, work=Work(tune=training.tune, lora=training.lora, recompute_every=every),
    )  # fmt: skip


def planned_parts(flops: Flops) -> dict[str, float]:
    """The plan's operations under the names of `count_parts`."""
    parts = ("dino", "vggt_frame", "vggt_global", "vision", "mergers", "llm_forward", "head")
    return {part: getattr(flops, part) for part in parts} | {"llm_backward": flops.backward, "whole": flops.total}


def real_size(preset: str) -> Size:
    return Size.of_preset(preset, image_width=644, camera=(640, 480), dtype=torch.bfloat16)
