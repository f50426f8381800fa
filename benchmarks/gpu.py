"""Where a training step's time goes on one GPU, and what each lever is worth there: python -m benchmarks.gpu --size 3b

Real sizes with random weights under a real DeepSpeed engine of one process; frames of 640×480 decoded by loader
processes, nine a sample. Results: samples/s, tokens/s, TFLOP/s and MFU (janus_cluster/plan/flops.py counts what the
network needs; recomputing is not in it), peak memory, time by part from CUDA events, waits for the device, kernel
launches. The run stops before `--minutes` are over; what it had no time for is named.

  --size 3b          Qwen2.5-VL-3B and VGGT-1B, whole: weights, gradients and fp32 AdamW states take about 70 GB
  --size 7b-layers   the 7B network with 7 and with 14 language layers; 28 are extrapolated from the two
  --size tiny        the tiny preset, for --device cpu: shows that the script runs, and nothing about speed
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import deepspeed
import torch

from benchmarks.gpu_measure import Result, first_line, loss_now, measure, render_result
from benchmarks.ways import OURS, PREDECESSOR, SEED, Bench, Rig, Size, Way, describe, network_sizes, one_process
from janus_cluster.janusvln.model.build import set_recompute
from janus_cluster.janusvln.model.compile import compile_blocks
from janus_cluster.plan.flops import Flops, Work, count_flops
from janus_cluster.plan.hardware import known_gpus
from janus_cluster.plan.sample import Sample, plan_sample
from janus_cluster.training.entry import quiet_libraries

CAMERA = (640, 480)
# Of the names that nvidia-smi gives, the data sheet's dense bf16 rate in TFLOP/s; None: no MFU.
PEAK_OF = {gpu.name: gpu.peak_tflops for gpu in known_gpus().values()}


def sizes_for(name: str) -> list[Size]:
    """The networks that `--size` names; of two, results are extrapolated over their language layers."""
    if name == "tiny":
        return [Size.of_preset("tiny", image_width=84, camera=(160, 120), dtype=torch.float32)]
    real: dict[str, Any] = {"image_width": 644, "camera": CAMERA, "dtype": torch.bfloat16}
    if name == "3b":
        return [Size.of_preset("qwen2.5-vl-3b", **real)]
    return [replace(Size.of_preset("qwen2.5-vl-7b", **real), text_layers=layers) for layers in (7, 14)]


@dataclass(frozen=True, kw_only=True)
class Lever:
    """What is ours against what, `off`: `switch` turns to it on the same engine, or another engine is built for it."""

    name: str
    off: Way
    same_engine: bool
    rows: int = 1


def levers(with_compile: bool) -> list[Lever]:
    """In the order in which time is spent on them."""
    found = [
        Lever(name="grouped windows", off=replace(OURS, vision="one window at a time"), same_engine=True),
        Lever(name="no recompute (off: every layer)", off=replace(OURS, recompute_every=1), same_engine=True),
        Lever(name="no recompute (off: every 2nd)", off=replace(OURS, recompute_every=2), same_engine=True),
        Lever(name="head on label positions", off=replace(OURS, head="all positions"), same_engine=True),
        Lever(name="one sample a micro-batch (off: two)", off=OURS, same_engine=True, rows=2),
    ]
    if with_compile:
        compiled = replace(OURS, compile_vggt=True)
        found.append(Lever(name="VGGT not compiled (off: compiled)", off=compiled, same_engine=True))
    return [
        *found,
        Lever(name="crop", off=replace(OURS, image_mode="pad"), same_engine=False),
        Lever(name="ZeRO-2 (off: ZeRO-1)", off=replace(OURS, zero="1"), same_engine=False),
        Lever(name="VGGT outside, one pass", off=replace(OURS, vggt=PREDECESSOR.vggt), same_engine=False),
        # The last one: DeepSpeed never lets go of a ZeRO-3 engine's memory.
        Lever(name="ZeRO-2 (off: ZeRO-3)", off=replace(OURS, zero="3"), same_engine=False),
    ]


BEFORE = Lever(name="everything (off: the predecessor)", off=PREDECESSOR, same_engine=False)


def switch(rig: Rig, way: Way) -> None:
    """The engine's model computes by `way`, where that needs no other engine."""
    model = rig.engine.module
    model.head_on_all_positions = way.head == "all positions"
    if way.vision == "one window at a time":
        model.use_plain_vision()
    else:
        model.use_own_vision()
    set_recompute(model, rig.bench.training(way))
    if way.compile_vggt:
        compile_blocks(model.vggt)
    else:
        for module in model.vggt.modules():
            module._compiled_call_impl = None


@dataclass
class Built:
    """An engine, or why there is none."""

    rig: Rig | None = None
    problem: str | None = None


class Session:
    """Engines one after the other on one GPU, within the time that there is."""

    def __init__(
        self, bench: Bench, size: Size, options: argparse.Namespace, *, deadline: float, save: Callable[[], None]
    ) -> None:
        self.bench, self.size, self.options, self.deadline, self._save = bench, size, options, deadline, save
        self.results: list[Result] = []
        self.ratios: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self._build_s = self._measure_s = 0.0

    def run(self) -> None:
        """Ours, then every lever that there is time for."""
        chosen = chosen_levers(self.options)
        ours = self._on_our_engine([lever for lever in chosen if lever.same_engine])
        for lever in chosen:
            if lever.same_engine or not self._time_left(lever, builds=1, measurements=1):
                continue
            result = self._on_own_engine(lever)
            # Both began with the same weights and batches.
            self._compare(lever.name, [result], [ours], abs(result.first_loss - ours.first_loss))

    def _on_our_engine(self, chosen: Sequence[Lever]) -> Result:
        """Ours, and the levers that need no other engine, off, on, off, on: the GPU's clock meets both alike."""
        with self._engine(OURS) as built:
            ours = self._measure(built, "ours", OURS, rows=1)
            for lever in chosen:
                if self._time_left(lever, builds=0, measurements=2 * self.options.pairs):
                    self._switch_to_and_fro(built, lever)
        return ours

    def _switch_to_and_fro(self, built: Built, lever: Lever) -> None:
        off, on, difference = [], [], 0.0
        for _ in range(self.options.pairs):
            if built.rig is None:
                # After running out of memory within a backward pass an engine is not to be trusted.
                self.left_out.append(f"{lever.name}: {built.problem}")
                return
            switch(built.rig, OURS)
            on_loss = loss_now(built.rig)
            switch(built.rig, lever.off)
            difference = abs(loss_now(built.rig) - on_loss)
            off.append(self._measure(built, f"{lever.name}: other", lever.off, rows=lever.rows))
            if built.rig is not None:
                switch(built.rig, OURS)
                on.append(self._measure(built, f"{lever.name}: ours", OURS, rows=1))
        self._compare(lever.name, off, on, difference)

    def _on_own_engine(self, lever: Lever) -> Result:
        with self._engine(lever.off) as built:
            return self._measure(built, lever.name, lever.off, rows=1)

    def _compare(self, name: str, off: Sequence[Result], on: Sequence[Result], loss_difference: float) -> None:
        """Keeps the lever's ratio; its spread is that of the pairs, or of the steps where there is one pair."""
        if len(off) != len(on) or any(r.problem for r in (*off, *on)):
            return
        ratios = [b.samples_per_s / a.samples_per_s for a, b in zip(off, on, strict=True)]
        low, high = min(ratios), max(ratios)
        if len(ratios) == 1:
            (a,), (b,) = off, on
            low, high = (
                b.rows * x / (a.rows * y) for x, y in ((min(a.step_s), max(b.step_s)), (max(a.step_s), min(b.step_s)))
            )
        self.ratios.append(
            {
                "lever": name,
                "ratio": statistics.median(ratios),
                "min": low,
                "max": high,
                "peak_gb": [off[0].peak_gb, on[0].peak_gb],
                "loss_difference": loss_difference,
            }
        )
        self._save()

    def _measure(self, built: Built, name: str, way: Way, *, rows: int) -> Result:
        """Measured, or why not: one lever's failure must not cost the others."""
        begun = time.perf_counter()
        result = Result(name=name, way=asdict(way), rows=rows, problem=built.problem)
        if built.rig is not None:
            try:
                result = measure(built.rig, name, way, rows=rows, options=self.options, flops=self._flops(way))
            except Exception as error:
                traceback.print_exc(limit=-3)
                result.problem = f"{type(error).__name__}: {first_line(error)}"
                built.rig, built.problem = None, f"{name}: {result.problem}"
        if not way.compile_vggt:
            # Compiling takes its minute once.
            self._measure_s = max(self._measure_s, time.perf_counter() - begun)
        self.results.append(result)
        # A call that is ended from outside has lost only what it was about.
        self._save()
        print(render_result(result), file=sys.stderr, flush=True)
        return result

    @contextmanager
    def _engine(self, way: Way) -> Iterator[Built]:
        """A built engine, or why there is none; under ZeRO-1 and 2 its memory is free again afterwards."""
        begun = time.perf_counter()
        rig, built = None, Built()
        try:
            rig = built.rig = Rig(self.bench, way)
        except Exception as error:
            traceback.print_exc(limit=-3)
            built.problem = f"not built: {type(error).__name__}: {first_line(error)}"
        self._build_s = max(self._build_s, time.perf_counter() - begun)
        try:
            yield built
        finally:
            if rig is not None:
                rig.close()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _sample(self, way: Way) -> Sample:
        text, labels = int(self.bench.text_tokens), int(self.bench.label_tokens)
        data = self.bench.data[way.image_mode]
        return plan_sample(data, camera=self.size.camera, text_tokens=text, label_tokens=labels)

    def _flops(self, way: Way) -> Flops:
        return count_flops(network_sizes(self.size), self._sample(way), Work(recompute_every=way.recompute_every))

    def as_record(self) -> dict[str, Any]:
        """What the JSON file holds of this network."""
        return {
            "size": {key: str(value) for key, value in asdict(self.size).items()},
            "sample": asdict(self._sample(OURS)) | {"tokens": self._sample(OURS).tokens},
            "flops_per_sample": self._flops(OURS).tflop(),
            "results": [asdict(result) for result in self.results],
            "ratios": self.ratios,
            "left_out": self.left_out,
        }

    def _time_left(self, lever: Lever, *, builds: int, measurements: int) -> bool:
        """No longer than the longest so far, each of them, and a third on top."""
        needed_s = builds * self._build_s + measurements * self._measure_s
        if time.monotonic() + 1.33 * needed_s < self.deadline:
            return True
        self.left_out.append(f"{lever.name}: no time left")
        return False


def chosen_levers(options: argparse.Namespace) -> list[Lever]:
    """Those that --levers names, all where it is not given, none for `-`; the predecessor last."""
    words = options.levers
    found = [
        lever
        for lever in levers(options.compile)
        if words is None or any(word != "-" and word in lever.name for word in words)
    ]
    return [*found, BEFORE] if options.predecessor else found


def extrapolate(few: float, many: float, *, layers: tuple[int, int], whole: int) -> float:
    """What grows evenly with the language layers, for `whole` of them, from two numbers of layers."""
    return many + (whole - layers[1]) * (many - few) / (layers[1] - layers[0])


def extrapolated(sessions: Sequence[Session], *, whole: int, peak_tflops: float | None) -> dict[str, Any]:
    """Seconds of a micro-step with `whole` language layers, part by part, from two networks; the MFU of that."""
    layers = (sessions[0].size.text_layers, sessions[1].size.text_layers)
    few, many = (session.results[0] for session in sessions)

    def at_whole(a: float, b: float) -> float:
        return extrapolate(a, b, layers=layers, whole=whole)

    step_s = at_whole(statistics.median(few.step_s), statistics.median(many.step_s))
    flops = at_whole(*(session._flops(OURS).model for session in sessions))
    return {
        "layers": whole,
        "micro_step_s": step_s,
        "parts_s": {
            part: at_whole(few.parts_s[part], many.parts_s[part]) for part in many.parts_s if part in few.parts_s
        },
        "mfu": flops / step_s / 1e12 / peak_tflops if peak_tflops else None,
    }


def render_ratios(session: Session) -> str:
    """Markdown, a row a lever."""
    lines = [
        "| lever | ours against the other, samples/s | min–max | peak GB other → ours | loss differs by |",
        "| --- | --- | --- | --- | --- |",
    ]
    for found in session.ratios:
        memory = " → ".join(f"{gb:.1f}" for gb in found["peak_gb"])
        lines.append(
            f"| {found['lever']} | {found['ratio']:.2f} | {found['min']:.2f}–{found['max']:.2f} | {memory} | "
            f"{found['loss_difference']:.1e} |"
        )
    lines += [f"| {reason} | – | – | – | – |" for reason in session.left_out]
    return "\n".join(lines)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("tiny", "3b", "7b-layers"), default="3b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps that are timed, for each way")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=2, help="off and on in turn, for levers on one engine")
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument(
        "--levers", nargs="*", help="only those whose name holds one of these words; none: `--levers -`"
    )
    parser.add_argument(
        "--predecessor",
        action="store_true",
        help="its way too: minutes, of which DeepSpeed scans most before the second step; give it a call of its own",
    )
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16; else from the GPU's name")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    deadline = time.monotonic() + 60 * options.minutes
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here; --device cpu --size tiny shows that the script runs")
    warnings.filterwarnings("ignore", category=FutureWarning)
    quiet_libraries()
    deepspeed.utils.logger.setLevel("ERROR")
    torch.manual_seed(SEED)
    about = describe("benchmarks.gpu")
    if options.peak_tflops is None and about["gpu"]:
        options.peak_tflops = next((peak for name, peak in PEAK_OF.items() if name in about["gpu"]), None)
    record: dict[str, Any] = {
        "about": about,
        "settings": {k: str(v) for k, v in vars(options).items()},
        "finished": False,
        "networks": [],
    }
    sessions: list[Session] = []

    def save() -> None:
        record["networks"] = [session.as_record() for session in sessions]
        if options.json:
            # In one step: a call may be ended from outside while it writes.
            beside = options.json.with_suffix(".part")
            beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            beside.replace(options.json)

    with one_process(options.device):
        for size in sizes_for(options.size):
            with tempfile.TemporaryDirectory(prefix="gpu-benchmark-") as folder:
                bench = Bench(
                    Path(folder) / "demo", size=size, device=options.device, accumulation=options.accumulation
                )
                sessions.append(Session(bench, size, options, deadline=deadline, save=save))
                sessions[-1].run()
            print(f"\n{render_ratios(sessions[-1])}\n", flush=True)
    if len(sessions) == 2 and not any(session.results[0].problem for session in sessions):
        record["extrapolated"] = found = extrapolated(sessions, whole=28, peak_tflops=options.peak_tflops)
        print(f"28 layers, extrapolated: {found['micro_step_s']:.3f} s a micro-step")
    # Without this line the call was cut short.
    record["finished"] = True
    save()


if __name__ == "__main__":
    main()
