"""Render a plan for people and programs: the table, the choice, and how far the figures can be trusted."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from janus_cluster.modelspec.sizes import Sizes
from janus_cluster.plan.choose import Option, describe_recompute
from janus_cluster.plan.hardware import ASSUMED, Gpu
from janus_cluster.plan.memory import GB
from janus_cluster.plan.time import LOGGED_STEP_S, predecessor_step
from janus_cluster.run.table import columns_to_drop

LINE_WIDTH = 120
# SIMPLE_HEAD with a padding of one column: between two columns, and at both edges together.
_GAP, _EDGES = 2, 3


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Result of `janus-cluster plan`. `samples` None: hours are for 100,000."""

    source: str
    gpu: Gpu
    sizes: Sizes
    as_it_is: Option
    options: Sequence[Option]
    chosen: Option | None
    reason: str
    to_type: Sequence[str]
    other_samples: Sequence[tuple[str, Option | None]]
    samples: int | None
    notes: Sequence[str]

    @property
    def epoch_samples(self) -> int:
        return self.samples or 100_000


def describe_trust() -> str:
    """What the model was compared with, and how far off it was; the tests hold these bounds."""
    predicted = predecessor_step().total
    return (
        "compared with torch's own count of FLOP (tiny network, CPU: error at most 0.5%; the real 7B and 3B, meta "
        "device: none); with the weights, gradients and optimizer state of real engines (ZeRO-1, 2, 3, two ranks): "
        "at most 1%; with the memory of a pass through the real 7B and 3B: 3% to 13% too much, and where all is "
        "recomputed 27% to 79% of what then is the small part, never too little; with the seconds of a larger network "
        "on one CPU thread, from setting to setting: at most 13%. Never compared with an "
        f"H800 run: seconds assume {ASSUMED.efficiency:.0%} of the peak. The predecessor's log (7B, 8×H800: "
        f"{LOGGED_STEP_S} s a step of 64) is reproduced as {predicted:.1f} s ({predicted / LOGGED_STEP_S - 1:+.0%}), "
        "four fifths of it ZeRO-3's hooks as measured on another CPU. See docs/performance.md"
    )


def render_head(plan: Plan, *, width: int | None = None) -> list[str]:
    """What is planned: the network, the sample and the batch, an entry each. Units: as render_options."""
    sample, option = plan.as_it_is.sample, plan.chosen or plan.as_it_is
    trained = plan.sizes.trained_parameters(option.setup.work.tune, option.setup.work.lora)
    everything = plan.sizes.engine_parameters(option.setup.work.lora) + plan.sizes.vggt_parameters
    flops = option.flops
    lines = [
        f"job      {plan.source}: {plan.sizes.name}, {trained / 1e6:,.1f} of {everything / 1e6:,.1f} million "
        f"parameters learn; effective batch {plan.as_it_is.setup.effective_batch}",
        f"sample   {sample.frames} frames of {sample.width}×{sample.height}: {sample.tokens:,} tokens "
        f"({sample.memory_tokens} an image), {flops.total / 1e12:.3g} TFLOP ({flops.vggt / 1e12:.3g} VGGT, "
        f"{flops.vision / 1e12:.3g} ViT, {flops.recompute / 1e12:.3g} recomputed); a full history, the longest sample",
    ]
    return [_wrap(line, width) for line in lines]


def render_options(plan: Plan, *, width: int | None = None) -> Table:
    """One row an option, those that fit first. Units: width columns of the terminal; None: no limit."""
    title = f"one {plan.gpu.name}, GB of 1e9 bytes; hours for {plan.epoch_samples:,} samples"
    names = (
        "", "nodes", "ZeRO", "batch", "recompute", "params", "grads", "optim", "buffers", "activ", "logits", "VGGT",
        "total", "fits", "s/step", "hours",
    )  # fmt: skip
    rows = []
    for option in plan.options:
        memory, time = option.memory, option.time
        parts = (
            memory.weights, memory.gradients, memory.optimizer, memory.buckets, memory.activations, memory.logits,
            memory.vggt, memory.total,
        )  # fmt: skip
        cells = [
            "→" if option is plan.chosen else "",
            str(option.setup.nodes),
            option.profile,
            f"{option.setup.micro_batch}×{option.setup.accumulation}",
            describe_recompute(option.setup.work.recompute_every),
            *(f"{part / GB:.1f}" for part in parts),
            "yes" if option.fits else "no",
            f"{time.total:.1f}",
            f"{option.epoch_hours(plan.epoch_samples):.1f}",
        ]
        rows.append((cells, "bold" if option is plan.chosen else None if option.fits else "dim"))
    # The parts of the sum, the smaller ones first.
    parts_of_sum = ("VGGT", "logits", "buffers", "optim", "grads", "params", "activ")
    return _table(title, names, rows, left=("", "ZeRO", "recompute", "fits"), width=width, droppable=parts_of_sum)


def render_other_samples(plan: Plan, *, width: int | None = None) -> Table:
    """What other histories and smaller frames cost, with the best option for each. Units: as render_options."""
    names = ("--set", "tokens", "TFLOP", "ZeRO", "batch", "recompute", "total", "s/step", "hours")
    rows: list[tuple[list[str], str | None]] = []
    for text, option in plan.other_samples:
        if option is None:
            rows.append(([text, "", "", "too long, or nothing fits"], "dim"))
            continue
        cells = [
            text,
            f"{option.sample.tokens:,}",
            f"{option.flops.total / 1e12:.0f}",
            option.profile,
            f"{option.setup.micro_batch}×{option.setup.accumulation}",
            describe_recompute(option.setup.work.recompute_every),
            f"{option.memory.total / GB:.1f}",
            f"{option.time.total:.1f}",
            f"{option.epoch_hours(plan.epoch_samples):.1f}",
        ]
        rows.append((cells, None))
    title = "other samples, the best option for each"
    left = ("--set", "ZeRO", "recompute")
    return _table(title, names, rows, left=left, width=width, droppable=("TFLOP", "tokens", "batch"))


def render_choice(plan: Plan, *, width: int | None = None) -> list[str]:
    """The option to take and why, what to type, and how far to trust it. Units: as render_options."""
    if plan.chosen is None:
        lines = [f"choice   none: {plan.reason}"]
    else:
        chosen = plan.chosen
        lines = [
            f"choice   {chosen.profile}, batch {chosen.setup.micro_batch}×{chosen.setup.accumulation}, recompute "
            f"{describe_recompute(chosen.setup.work.recompute_every)}, {chosen.setup.nodes} node"
            f"{'s' * (chosen.setup.nodes > 1)}: {plan.reason}",
            f"type     {' '.join(plan.to_type) or 'nothing: the job has it'}",
        ]
    lines += [*(f"note     {note}" for note in plan.notes), f"trust    {describe_trust()}"]
    # What is to be typed stays on one line, so that it can be copied.
    return [line if line.startswith("type") else _wrap(line, width) for line in lines]


def _wrap(line: str, width: int | None) -> str:
    columns = min(width or LINE_WIDTH, LINE_WIDTH)
    return textwrap.fill(line, columns, subsequent_indent=" " * 9, break_on_hyphens=False, break_long_words=False)


def _table(
    title: str,
    names: Sequence[str],
    rows: Sequence[tuple[Sequence[str], str | None]],
    *,
    left: Sequence[str],
    width: int | None,
    droppable: Sequence[str],
) -> Table:
    """Rows of cells and style. The title names the columns that a narrow terminal has no room for."""
    widths = {name: max([len(name), *(len(row[i]) for row, _ in rows if i < len(row))]) for i, name in enumerate(names)}
    room = None if width is None else width - _EDGES
    dropped = columns_to_drop(widths, width=room, gap=_GAP, droppable=droppable)
    title += f"; no room for {', '.join(dropped)}" if dropped else ""
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    kept = [i for i, name in enumerate(names) if name not in dropped]
    for i in kept:
        table.add_column(names[i], justify="left" if names[i] in left else "right", no_wrap=True)
    for row, style in rows:
        table.add_row(*(row[i] for i in kept if i < len(row)), style=style)
    return table


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The plan as one JSON object; GB of 1e9 bytes, seconds, TFLOP."""
    return {
        "job": plan.source,
        "gpu": plan.gpu.name,
        "network": plan.sizes.name,
        "effective_batch": plan.as_it_is.setup.effective_batch,
        "sample": asdict(plan.as_it_is.sample) | {"tokens": plan.as_it_is.sample.tokens},
        "epoch_samples": plan.epoch_samples,
        "as_it_is": option_to_json(plan.as_it_is, plan.epoch_samples),
        "options": [option_to_json(option, plan.epoch_samples) for option in plan.options],
        "choice": None if plan.chosen is None else option_to_json(plan.chosen, plan.epoch_samples),
        "reason": plan.reason,
        "type": list(plan.to_type),
        "other_samples": [
            {"set": text, "best": None if option is None else option_to_json(option, plan.epoch_samples)}
            for text, option in plan.other_samples
        ],
        "assumptions": asdict(ASSUMED) | {"gpu": asdict(plan.gpu)},
        "notes": list(plan.notes),
        "trust": describe_trust(),
    }


def option_to_json(option: Option, samples: int) -> dict[str, Any]:
    """One option with everything it was judged by."""
    setup = option.setup
    return {
        "nodes": setup.nodes,
        "profile": option.profile,
        "micro_batch": setup.micro_batch,
        "accumulation": setup.accumulation,
        "recompute_every": setup.work.recompute_every,
        "fits": option.fits,
        "tokens": option.sample.tokens,
        "tflop_per_sample": option.flops.tflop(),
        "memory_gb": option.memory.in_gb(),
        "memory_limit_gb": round(option.memory_limit / GB, 1),
        "step_s": {name: round(value, 3) for name, value in asdict(option.time).items()}
        | {"total": round(option.time.total, 3)},
        "epoch_hours": round(option.epoch_hours(samples), 2),
    }
