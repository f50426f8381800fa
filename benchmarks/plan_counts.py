"""The plan's operations and bytes at the real sizes against what torch counts: python -m benchmarks.plan_counts

The real networks on torch's meta device: every operator runs with its real shapes, nothing is computed or allocated, so
that a 7B network fits a laptop. Attention goes through the flash kernel that a GPU would take. Compared are

  operations  of every part, forward and backward, by torch's FlopCounterMode; torch counts a causal mask's whole square
              and what a flash kernel computes again in its backward pass: both are shown apart
  memory      what lives after the forward pass and at its fullest, followed storage by storage; each gradient is taken
              away as soon as it is complete (what a ZeRO-2 or 3 engine does; the states are counted apart)

against plan/flops.py and plan/memory.py for the same sample; and counted besides

  launches    operators that compute, at least one kernel each, and the bytes that they read and write

Kernels' own workspaces (cuBLAS, what a flash kernel's backward pass adds up in fp32) are not seen by torch's operators,
nor is the allocator's fragmentation.
"""

from __future__ import annotations

import argparse
import gc
import json
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import backward
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.ways import Size, describe, network_sizes
from janus_cluster.config.schema import Data, Lora, Model, Training, Tune
from janus_cluster.plan.choose import RECOMPUTE_EVERY, describe_recompute
from janus_cluster.plan.flops import Flops, Work, count_flops
from janus_cluster.plan.hardware import GPUS
from janus_cluster.plan.memory import GB, activation_bytes, plan_memory
from janus_cluster.plan.sample import Sample, plan_sample
from janus_cluster.plan.setup import Setup
from janus_cluster.training.entry import quiet_libraries
from janus_cluster.training.model.build import mark_trainable, set_recompute
from janus_cluster.training.model.janus import JanusModel
from janus_cluster.training.model.layout import TextLayout, read_layout
from janus_cluster.training.model.lora import add_adapters
from janus_cluster.training.model.pixels import qwen_patches, unit_frames
from janus_cluster.training.model.presets import TokenizerIds, build_config
from janus_cluster.training.model.vggt import Aggregator
from janus_cluster.training.model.vision import plan_vision

META = torch.device("meta")
REAL = ("qwen2.5-vl-7b", "qwen2.5-vl-3b")
PRODUCTS = frozenset(
    f"aten::{name}"
    for name in (
        "mm", "addmm", "bmm", "baddbmm", "convolution",
        "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward",
    )
)  # fmt: skip
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
    return float(sdpa_flop_count(q, k, v)) / (2 if causal else 1)  # type: ignore[no-untyped-call]


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


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operators that compute, and the bytes they read and write, by the part that is open; views do neither.

    A kernel for each at least: what is counted is the least of launches, and what fusing could spare of memory traffic.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part = "rest"
        self.found: dict[str, dict[str, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_iter(result) if isinstance(x, Tensor) and x.device == META]
        sources = {x.untyped_storage()._cdata for x in given}
        is_view = not func._schema.is_mutable and all(x.untyped_storage()._cdata in sources for x in made)
        name = func._schema.name
        if made and not is_view and not name.startswith("aten::empty"):
            size = sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in (*given, *made))
            kind = "product_bytes" if name in PRODUCTS else "other_bytes"
            of_part = self.found.setdefault(
                self.part, {"launches": 0, "product_bytes": 0, "other_bytes": 0, "operators": Counter()}
            )
            of_part["launches"] += 1
            of_part[kind] += size
            if kind == "other_bytes":
                of_part["operators"][name.removeprefix("aten::")] += size
        return result


def count_launches(model: CountedModel, batch: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Launches and bytes of one pass over the batch, by part; `rest`: pixels, merging, heads and loss.

    `operators`: bytes of those that are no products, the largest first.
    """
    learning = [p for p in model.parameters() if p.requires_grad]
    handles = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in learning]
    with flash_attention(), Launches() as counted:
        # What is cached is made in a first pass.
        backward([model(**batch).loss])
        counted.found.clear()
        around = []

        def enter(part: str) -> None:
            around.append(counted.part)
            counted.part = part

        def leave(*_: Any) -> None:
            counted.part = around.pop()

        vggt = model.vggt
        parts = (
            ("ViT", model.model.visual), ("VGGT", vggt), ("DINO", vggt.patch_embed),
            ("LLM forward", model.model.language_model),
        )  # fmt: skip
        for part, module in parts:
            handles.append(module.register_forward_pre_hook(lambda *_, part=part: enter(part)))
            handles.append(module.register_forward_hook(leave))
        loss = model(**batch).loss
        counted.part = "backward"
        backward([loss])
    for handle in handles:
        handle.remove()
    found: dict[str, dict[str, Any]] = counted.found
    for of_part in found.values():
        of_part["operators"] = dict(of_part["operators"].most_common(8))
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


def compare_flops(preset: str, every: int) -> dict[str, Any]:
    """One row of the table of operations, TFLOP a sample."""
    size, sample = real_size(preset), plan_sample(Data())
    model = build_network(size, training_of(every))
    batch = make_batch(model, sample, 1)
    planned = planned_parts(count_flops(network_sizes(size), sample, Work(recompute_every=every)))
    return {
        "preset": preset,
        "recompute_every": every,
        "planned": {part: value / 1e12 for part, value in planned.items()},
        "counted": {part: value / 1e12 for part, value in count_parts(model, batch).items()},
        "as_torch": {part: value / 1e12 for part, value in count_parts(model, batch, as_torch=True).items()},
    }


def compare_memory(preset: str, every: int, rows: int, learns: str = "as shipped") -> dict[str, Any]:
    """One row of the table of memory, GB."""
    size, sample, setup = real_size(preset), plan_sample(Data()), setup_of(every, rows, learns)
    model = build_network(size, training_of(every, learns))
    found = follow_memory(model, make_batch(model, sample, rows))
    planned = plan_memory(network_sizes(size), sample, setup)
    return {
        "preset": preset,
        "learns": learns,
        "recompute_every": every,
        "rows": rows,
        "planned": {
            "kept": activation_bytes(network_sizes(size), sample, setup) / GB,
            "encoder": planned.encoder / GB,
            "peak": max(planned.encoder, planned.activations + planned.logits) / GB,
            "total": planned.total / GB,
        },
        "followed": {part: value / GB for part, value in found.items()},
    }


def compare_launches(preset: str, every: int) -> dict[str, Any]:
    """What the plan does not count: launches, and the memory traffic of what is no matrix product."""
    size = real_size(preset)
    model = build_network(size, training_of(every))
    return {
        "preset": preset,
        "recompute_every": every,
        "parts": count_launches(model, make_batch(model, plan_sample(Data()), 1)),
        "tflop": count_flops(network_sizes(size), plan_sample(Data()), Work(recompute_every=every)).model / 1e12,
    }


def real_size(preset: str) -> Size:
    return Size.of_preset(preset, image_width=644, camera=(640, 480), dtype=torch.bfloat16)


def render_flops(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a part, what the plan says and what torch counted."""
    lines = [
        "| TFLOP a sample | part | planned | counted | error | as torch counts attention |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        name = f"{row['preset'][-2:]}, {describe_recompute(row['recompute_every'])} recomputed"
        for part, planned in row["planned"].items():
            counted, whole = row["counted"][part], row["as_torch"][part]
            lines.append(
                f"| {name} | {part} | {planned:.4f} | {counted:.4f} | {planned / counted - 1:+.3%} | {whole:.2f} |"
            )
    return "\n".join(lines)


def render_memory(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a setting, GB."""
    lines = [
        "| network, rows, recomputed | kept: planned | followed | error | encoding: planned | ViT | VGGT "
        "| fullest: planned | followed | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        name = f"{row['preset'][-2:]}, {row['rows']}, {describe_recompute(row['recompute_every'])}"
        name += "" if row["learns"] == "as shipped" else f", {row['learns']}"
        planned, found = row["planned"], row["followed"]
        lines.append(
            f"| {name} | {planned['kept']:.2f} | {found['kept']:.2f} | {planned['kept'] / found['kept'] - 1:+.1%} "
            f"| {planned['encoder']:.2f} | {found['vision']:.2f} | {found['vggt']:.2f} "
            f"| {planned['peak']:.2f} | {found['peak']:.2f} | {planned['peak'] / found['peak'] - 1:+.1%} |"
        )
    return "\n".join(lines)


def render_launches(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a part; `at least` is the traffic of what is no product at the data sheets' bandwidths."""
    lines = [
        "| network, recomputed | part | launches | GB of products | GB of all else | at least, ms: H800 | H200 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        name = f"{row['preset'][-2:]}, {describe_recompute(row['recompute_every'])}"
        for part, found in row["parts"].items():
            ms = [found["other_bytes"] / 1e6 / GPUS[gpu].hbm_gb_per_s for gpu in ("h800", "h200")]
            lines.append(
                f"| {name} | {part} | {found['launches']:,.0f} | {found['product_bytes'] / GB:.1f} "
                f"| {found['other_bytes'] / GB:.1f} | {ms[0]:.1f} | {ms[1]:.1f} |"
            )
    for row in rows:
        traffic = sum(found["other_bytes"] for found in row["parts"].values())
        for gpu in (GPUS["h800"], GPUS["h200"]):
            products_ms, else_ms = 1e3 * row["tflop"] / gpu.peak_tflops, traffic / 1e6 / gpu.hbm_gb_per_s
            most = products_ms / (products_ms + else_ms)
            lines.append(
                f"\n{row['preset'][-2:]}, {gpu.name}: products at the data sheet's peak {products_ms:.0f} ms, all else "
                f"at its bandwidth {else_ms:.0f} ms: without fusing at most {most:.0%} MFU"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_counts", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--presets", nargs="+", choices=REAL, default=list(REAL))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2], help="samples of a micro-batch")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    quiet_libraries()
    about = describe("benchmarks.plan_counts")
    flops = [compare_flops(preset, every) for preset in options.presets for every in (0, 2, 1)]
    print(render_flops(flops), "", sep="\n", flush=True)
    memory = [
        compare_memory(preset, every, rows)
        for preset in options.presets
        for rows in options.rows
        for every in RECOMPUTE_EVERY
    ]
    memory += [compare_memory("qwen2.5-vl-7b", every, 1, learns) for learns in ("ViT too", "LoRA") for every in (0, 1)]
    print(render_memory(memory), "", sep="\n", flush=True)
    launches = [compare_launches(preset, 0) for preset in options.presets]
    print(render_launches(launches))
    if options.json:
        record = {"about": about, "flops": flops, "memory": memory, "launches": launches}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
