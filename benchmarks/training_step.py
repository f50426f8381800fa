"""What a micro-step costs, ours against the predecessor's, lever by lever: python -m benchmarks.training_step

Every way of computing it (data to gradients, and the optimizer's share) is built in one process under a real DeepSpeed
engine, and all take turns: a ratio is taken within one round, so that a machine that others use too cancels out. The
same samples, initial weights and random state everywhere: what claims to be exact must give the same loss.

  --size tiny    the networks of the tiny preset
  --size small   the depths of the 7B network and of VGGT-1B with tiny widths: all their module calls, few of their FLOP

Times on a CPU show calls, hooks and copies; a GPU spends its time otherwise: python -m benchmarks.gpu.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import deepspeed

from benchmarks.counting import Counts
from benchmarks.ways import OURS, PREDECESSOR, SIZES, Bench, Rig, Way, describe, one_process
from janus_cluster.training.entry import quiet_libraries

NO_RECOMPUTE: dict[str, Any] = {"recompute_every": 0, "recompute_vision": False}
# (lever, off → on, from which way, what is changed, whether this is the lever's "on" side)
LEVERS: tuple[tuple[str, str, dict[str, Any], dict[str, Any]], ...] = (
    (
        "VGGT outside the engine, one pass",
        "inside, frame by frame → outside, one pass",
        {"vggt": PREDECESSOR.vggt},
        {"vggt": OURS.vggt},
    ),
    ("ZeRO-3, old JSON → ZeRO-2", "3 → 2", {"zero": "3, old JSON"}, {"zero": "2"}),
    ("crop", "pad → crop", {"image_mode": "pad"}, {"image_mode": "crop"}),
    ("no recompute", "every layer → none", {"recompute_every": 1, "recompute_vision": True}, NO_RECOMPUTE),
    ("head on label positions", "all → labels", {"head": "all positions"}, {"head": "label positions"}),
    (
        "grouped windows, layout read once",
        "a call a window → a call a length",
        {"vision": "one window at a time"},
        {"vision": "grouped"},
    ),
    ("uint8 pixels", "floats → uint8", {"pixels": "floats"}, {"pixels": "uint8"}),
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`off` and `on` are names of ways; `exact`: both must give the same loss."""

    lever: str
    what: str
    off: str
    on: str
    exact: bool = True


def plan(*, with_compile: bool, few: bool) -> tuple[dict[str, Way], list[Comparison]]:
    """Every way by name, and what is compared with what. `few`: the whole, each lever taken out of ours, the engine."""
    ways = {"predecessor": PREDECESSOR, "ours": OURS}
    same_pixels = "predecessor, crop"
    ways[same_pixels] = replace(PREDECESSOR, image_mode="crop")
    compared = [
        Comparison(lever="everything", what="predecessor → ours", off="predecessor", on="ours", exact=False),
        Comparison(lever="everything but crop", what="predecessor, crop → ours", off=same_pixels, on="ours"),
    ]
    for lever, what, off, on in LEVERS:
        without = f"ours without {lever}"
        ways[without] = replace(OURS, **off)
        exact = lever != "crop"
        compared.append(Comparison(lever=lever, what=f"{what}, last", off=without, on="ours", exact=exact))
        if few:
            continue
        alone = f"predecessor with {lever}"
        ways[alone] = replace(PREDECESSOR, **on)
        compared.append(Comparison(lever=lever, what=f"{what}, first", off="predecessor", on=alone, exact=exact))
    ways |= {"ours, ZeRO-1": replace(OURS, zero="1"), "ours, no engine": replace(OURS, zero="no engine")}
    compared += [
        Comparison(lever="ZeRO-2 → ZeRO-1", what="our JSONs, last", off="ours", on="ours, ZeRO-1"),
        Comparison(lever="ZeRO-1 → no engine", what="plain torch, last", off="ours, ZeRO-1", on="ours, no engine"),
    ]
    if not few:
        ways |= {
            "ours, ZeRO-3": replace(OURS, zero="3"),
            "ours, every 2nd recomputed": replace(OURS, recompute_every=2),
            "predecessor, VGGT in one pass inside": replace(PREDECESSOR, vggt="inside, one pass"),
            "ours, 4 mixed rows as drawn": replace(OURS, batches="mixed, as drawn"),
            "ours, 4 mixed rows by length": replace(OURS, batches="mixed, by length"),
        }
        compared += [
            Comparison(lever="ZeRO-3 → ZeRO-2", what="our JSONs, last", off="ours, ZeRO-3", on="ours"),
            Comparison(
                lever="recompute every 2nd layer → none", what="last", off="ours, every 2nd recomputed", on="ours"
            ),
            Comparison(
                lever="VGGT in one pass, still inside",
                what="first",
                off="predecessor",
                on="predecessor, VGGT in one pass inside",
            ),
        ]
        compared.append(
            Comparison(
                lever="rows of like length together",
                what="4 rows of 1 to 9 frames, last",
                off="ours, 4 mixed rows as drawn",
                on="ours, 4 mixed rows by length",
            )
        )
    if with_compile:
        ways["ours, VGGT compiled"] = replace(OURS, compile_vggt=True)
        compared.append(
            Comparison(lever="torch.compile of VGGT's blocks", what="last", off="ours", on="ours, VGGT compiled")
        )
    return ways, compared


@dataclass
class Row:
    """One comparison, measured. Ratios are off / on: above 1 the lever pays."""

    lever: str
    what: str
    off: str
    on: str
    ratio: float
    ratio_low: float
    ratio_high: float
    compute_ratio: float
    wall_ratio: float
    exact: bool
    loss_difference: float
    norm_difference: float
    later_loss_difference: float


def compare(rigs: dict[str, Rig], comparison: Comparison) -> Row:
    off, on = rigs[comparison.off], rigs[comparison.on]
    pairs = list(zip(off.times, on.times, strict=True))
    ratios = [a.whole_s / b.whole_s for a, b in pairs]
    return Row(
        lever=comparison.lever,
        what=comparison.what,
        off=comparison.off,
        on=comparison.on,
        ratio=statistics.median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        compute_ratio=statistics.median(a.compute_s / b.compute_s for a, b in pairs),
        wall_ratio=statistics.median(a.wall_s / b.wall_s for a, b in pairs),
        exact=comparison.exact,
        loss_difference=abs(off.losses[0] - on.losses[0]),
        norm_difference=abs(off.norms[0] - on.norms[0]) / off.norms[0],
        later_loss_difference=abs(off.losses[-1] - on.losses[-1]),
    )


def measure(
    bench: Bench, ways: dict[str, Way], *, repeats: int, warm_up: int, counted: bool = True
) -> tuple[dict[str, Rig], dict[str, Counts]]:
    """Every way has run the same steps, in turns, and the counts of one step of each."""
    rigs: dict[str, Rig] = {}
    for name, way in ways.items():
        print(f"building: {name}", file=sys.stderr, flush=True)
        rigs[name] = Rig(bench, way)
        for _ in range(warm_up):
            rigs[name].step()
    names = list(rigs)
    gc.collect()
    gc.freeze()
    for number in range(repeats):
        # Each round begins with another one, so that no way always follows the same.
        for name in names[number % len(names) :] + names[: number % len(names)]:
            gc.collect()
            rigs[name].step(timed=True)
        print(f"round {number + 1} of {repeats}", file=sys.stderr, flush=True)
    return rigs, {name: rig.count() for name, rig in rigs.items()} if counted else {}


def render_about(report: Report) -> str:
    """One line: when, on what, with what, beside how much other work."""
    about, settings = report.about, report.settings
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    return (
        f"{about['date']}, {about['gpu'] or about['cpu']}, {about['cores']} cores, load {about['load_average']:.1f}, "
        f"{versions}; {settings['wall_s']} s: {about['command']}"
    )


def render_rows(rows: Sequence[Row], counts: dict[str, Counts]) -> str:
    """Markdown, a row a comparison."""
    lines = [
        "| lever | off → on | ratio | min–max | by the clock | without data | loss differs by | gradient norm by "
        "| peak MB off → on |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        exact = f"{row.loss_difference:.1e}" if row.exact else "other pixels"
        norm = f"{row.norm_difference:.1e}" if row.exact else "–"
        memory = "–"
        if counts:
            memory = f"{counts[row.off].peak_bytes / 1e6:.1f} → {counts[row.on].peak_bytes / 1e6:.1f}"
        lines.append(
            f"| {row.lever} | {row.what} | {row.ratio:.2f} | {row.ratio_low:.2f}–{row.ratio_high:.2f} | "
            f"{row.wall_ratio:.2f} | {row.compute_ratio:.2f} | {exact} | {norm} | {memory} |"
        )
    return "\n".join(lines)


def render_counts(rigs: dict[str, Rig], counts: dict[str, Counts], accumulation: int) -> str:
    """Markdown, a row a way: times and counts of a micro-step."""
    lines = [
        "| way | micro-step CPU s | of it data | module calls | host waits | operators | collectives |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, rig in rigs.items():
        whole = statistics.median(t.whole_s for t in rig.times)
        data = statistics.median(t.data_s for t in rig.times)
        cells = ["–"] * 4
        if counts:
            found = counts[name]
            numbers = (found.module_calls, found.host_waits, found.operators, sum(found.collectives.values()))
            cells = [f"{n / accumulation:,.0f}" for n in numbers]
        lines.append(f"| {name} | {whole:.4f} | {data:.4f} | {' | '.join(cells)} |")
    return "\n".join(lines)


@dataclass
class Report:
    """Everything that was found, as the JSON file holds it."""

    about: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    ways: dict[str, Any] = field(default_factory=dict)
    peak_rss_mb: float = 0.0


def run(
    *, size: str, device: str, repeats: int, accumulation: int, few: bool, with_compile: bool
) -> tuple[Report, str]:
    """Measured, as a report and as Markdown."""
    begun = time.perf_counter()
    settings = {"size": size, "device": device, "repeats": repeats, "accumulation": accumulation} | {
        k: str(v) for k, v in asdict(SIZES[size]).items()
    }
    report = Report(describe("benchmarks.training_step"), settings)
    ways, comparisons = plan(with_compile=with_compile, few=few)
    with tempfile.TemporaryDirectory(prefix="training-step-") as folder, one_process(device):
        bench = Bench(Path(folder) / "demo", size=SIZES[size], device=device, accumulation=accumulation)
        rigs, counts = measure(bench, ways, repeats=repeats, warm_up=2)
        report.rows = [compare(rigs, comparison) for comparison in comparisons]
        report.ways = {
            name: {
                "way": asdict(rig.way),
                "times": [asdict(t) for t in rig.times],
                "losses": rig.losses,
                "counts_per_optimizer_step": asdict(counts[name]),
            }
            for name, rig in rigs.items()
        }
        report.peak_rss_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        text = f"{render_rows(report.rows, counts)}\n\n{render_counts(rigs, counts, accumulation)}"
        for rig in rigs.values():
            rig.engine.destroy()
    report.settings["wall_s"] = round(time.perf_counter() - begun)
    return report, text


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--accumulation", type=int, default=2, help="micro-steps of an optimizer step")
    parser.add_argument(
        "--few", action="store_true", help="the whole, each lever taken out of ours, and the engine; nothing else"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile too (needs g++ on a CPU)")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def main() -> None:
    options = parse_arguments()
    warnings.filterwarnings("ignore", category=FutureWarning)
    quiet_libraries()
    deepspeed.utils.logger.setLevel("ERROR")
    report, text = run(
        size=options.size,
        device=options.device,
        repeats=options.repeats,
        accumulation=options.accumulation,
        few=options.few,
        with_compile=options.compile,
    )
    print(f"{render_about(report)}\n\n{text}")
    if options.json:
        options.json.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
