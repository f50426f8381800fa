"""Where a training step's time goes on one GPU, and what each lever is worth there: python -m benchmarks.gpu --size 3b

Real sizes with random weights under a real DeepSpeed engine of one process; frames of 640×480 decoded by loader
processes, nine a sample. Results: samples/s, tokens/s, TFLOP/s and MFU (janus_cluster/plan/flops.py counts what the
network needs; recomputing is not in it), peak memory, time by part from CUDA events, waits for the device, kernel
launches. The run stops by itself before `--minutes` are over; what it had no time for is named.

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
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import deepspeed
import torch

from benchmarks.gpu_measure import Result, loss_now, measure, render_result
from benchmarks.ways import OURS, PREDECESSOR, SEED, Bench, Rig, Size, Way, describe, one_process
from janus_cluster.config.networks import PRESETS
from janus_cluster.plan.flops import Flops, Work, count_flops
from janus_cluster.plan.hardware import GPUS
from janus_cluster.plan.sample import plan_sample
from janus_cluster.plan.sizes import TINY_VOCABULARY, Sizes, sizes_of
from janus_cluster.training.entry import quiet_libraries
from janus_cluster.training.model.build import set_recompute
from janus_cluster.training.model.compile import compile_blocks

CAMERA = (640, 480)
# Of the names that nvidia-smi gives, the data sheet's dense bf16 rate in TFLOP/s; None: MFU is not said.
PEAK_OF = {"H200": GPUS["h200"].peak_tflops, "H800": GPUS["h800"].peak_tflops, "H100": GPUS["h800"].peak_tflops}


def sizes_for(name: str) -> list[Size]:
    """The networks that `--size` names; of two, results are extrapolated over their language layers."""
    if name == "tiny":
        return [Size.of_preset("tiny", image_width=84, camera=(160, 120), dtype=torch.float32)]
    real: dict[str, Any] = {"image_width": 644, "camera": CAMERA, "dtype": torch.bfloat16}
    if name == "3b":
        return [Size.of_preset("qwen2.5-vl-3b", **real)]
    return [replace(Size.of_preset("qwen2.5-vl-7b", **real), text_layers=layers) for layers in (7, 14)]


def network_sizes(size: Size) -> Sizes:
    """`size` as the plan counts it."""
    preset = PRESETS[size.preset]
    vggt = preset.vggt.to_dict() | {"depth": size.vggt_depth, "dino_depth": size.dino_depth}
    text = {"vocab_size": TINY_VOCABULARY} | preset.text | {"num_hidden_layers": size.text_layers}
    values = {
        "text_config": text,
        "vision_config": preset.vision,
        "tie_word_embeddings": preset.tie_word_embeddings,
        "vggt_config": vggt,
        "vggt_merger_hidden_dim": preset.vggt_merger_hidden_dim,
    }
    return sizes_of(values, preset=preset, name=size.preset)


@dataclass(frozen=True, kw_only=True)
class Lever:
    """`switch` turns ours into the way without the lever, on the same engine; another engine where it cannot."""

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
        Lever(name="two samples a row of the batch (on) or one", off=OURS, same_engine=True, rows=2),
    ]
    if with_compile:
        found.append(Lever(name="VGGT compiled (on) or not", off=replace(OURS, compile_vggt=True), same_engine=True))
    return [
        *found,
        Lever(name="crop", off=replace(OURS, image_mode="pad"), same_engine=False),
        Lever(name="ZeRO-2 (off: ZeRO-3)", off=replace(OURS, zero="3"), same_engine=False),
        Lever(name="ZeRO-2 (on) or ZeRO-1", off=replace(OURS, zero="1"), same_engine=False),
        Lever(name="VGGT outside, one pass", off=replace(OURS, vggt=PREDECESSOR.vggt), same_engine=False),
    ]


BEFORE = Lever(name="everything (off: the predecessor)", off=PREDECESSOR, same_engine=False)


def switch(rig: Rig, way: Way) -> None:
    """The engine's model computes as `way` says, where that needs no other engine."""
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


class Session:
    """Engines one after the other on one GPU, within the time that there is."""

    def __init__(
        self, bench: Bench, size: Size, options: argparse.Namespace, *, deadline: float, save: Callable[[], None]
    ) -> None:
        self.bench, self.size, self.options, self.deadline, self._save = bench, size, options, deadline, save
        self.results: list[Result] = []
        self.ratios: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self._longest_s = 0.0

    def run(self) -> None:
        """Ours, then every lever that there is time for."""
        chosen = [lever for lever in levers(self.options.compile) if self._wanted(lever)]
        if self.options.predecessor:
            chosen.append(BEFORE)
        with self._engine(OURS) as rig:
            ours = self._measure(rig, "ours", OURS, rows=1)
            for lever in [lever for lever in chosen if lever.same_engine]:
                self._on_same_engine(rig, lever)
        for lever in [lever for lever in chosen if not lever.same_engine]:
            if not self._time_left(lever.name):
                continue
            with self._engine(lever.off) as other:
                result = self._measure(other, lever.name, lever.off, rows=1)
            # Both began with the same weights and batches.
            self._compare(lever.name, [result], [ours], abs(result.first_loss - ours.first_loss))

    def _on_same_engine(self, rig: Rig | None, lever: Lever) -> None:
        """Off, on, off, on: what the GPU's clock does meanwhile meets both."""
        if rig is None or not self._time_left(lever.name):
            return
        off, on = [], []
        for _ in range(self.options.pairs):
            switch(rig, OURS)
            on_loss = loss_now(rig)
            switch(rig, lever.off)
            difference = abs(loss_now(rig) - on_loss)
            off.append(self._measure(rig, f"{lever.name}: other", lever.off, rows=lever.rows))
            switch(rig, OURS)
            on.append(self._measure(rig, f"{lever.name}: ours", OURS, rows=1))
        self._compare(lever.name, off, on, difference)

    def _compare(self, name: str, off: Sequence[Result], on: Sequence[Result], loss_difference: float) -> None:
        if any(r.problem for r in (*off, *on)):
            return
        ratios = [b.samples_per_s / a.samples_per_s for a, b in zip(off, on, strict=True)]
        self.ratios.append(
            {
                "lever": name,
                "ratio": statistics.median(ratios),
                "min": min(ratios),
                "max": max(ratios),
                "peak_gb": [off[0].peak_gb, on[0].peak_gb],
                "loss_difference": loss_difference,
            }
        )

    def _measure(self, rig: Rig | None, name: str, way: Way, *, rows: int) -> Result:
        begun = time.perf_counter()
        if rig is None:
            result = Result(name=name, way=asdict(way), rows=rows, problem="the engine could not be built")
        else:
            try:
                flops = self._flops(way)
                result = measure(rig, name, way, rows=rows, options=self.options, flops=flops)
            except torch.OutOfMemoryError as error:
                rig.engine.zero_grad()
                result = Result(name=name, way=asdict(way), rows=rows, problem=str(error).splitlines()[0])
        if not way.compile_vggt:
            # Compiling takes its minute once.
            self._longest_s = max(self._longest_s, time.perf_counter() - begun)
        self.results.append(result)
        # A call that is ended from outside has lost only what it was about.
        self._save()
        print(render_result(result), file=sys.stderr, flush=True)
        return result

    @contextmanager
    def _engine(self, way: Way) -> Iterator[Rig | None]:
        """A built engine, or None where it does not fit; its memory is free again afterwards."""
        begun = time.perf_counter()
        rig = None
        try:
            rig = Rig(self.bench, way)
        except torch.OutOfMemoryError as error:
            print(f"{way}: {str(error).splitlines()[0]}", file=sys.stderr)
        self._longest_s = max(self._longest_s, time.perf_counter() - begun)
        try:
            yield rig
        finally:
            if rig is not None:
                rig.engine.destroy()
            del rig
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _flops(self, way: Way) -> Flops:
        sizes = network_sizes(self.size)
        data = self.bench.data[way.image_mode]
        text = int(self.bench.text_tokens)
        sample = plan_sample(data, camera=self.size.camera, text_tokens=text, label_tokens=int(self.bench.label_tokens))
        return count_flops(sizes, sample, Work(recompute_every=way.recompute_every))

    def as_record(self) -> dict[str, Any]:
        """What the JSON file holds of this network."""
        return {
            "size": {key: str(value) for key, value in asdict(self.size).items()},
            "flops_per_sample": self._flops(OURS).tflop(),
            "results": [asdict(result) for result in self.results],
            "ratios": self.ratios,
            "left_out": self.left_out,
        }

    def _wanted(self, lever: Lever) -> bool:
        return not self.options.levers or any(word in lever.name for word in self.options.levers)

    def _time_left(self, name: str) -> bool:
        # An engine and a measurement each take no longer than the longest so far.
        if time.monotonic() + 2.5 * self._longest_s < self.deadline:
            return True
        self.left_out.append(name)
        return False


def extrapolate(few: Result, many: Result, *, layers: tuple[int, int], whole: int) -> float:
    """Seconds of a micro-step with `whole` language layers, from two numbers of them."""
    a, b = statistics.median(few.step_s), statistics.median(many.step_s)
    return b + (whole - layers[1]) * (b - a) / (layers[1] - layers[0])


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
    lines += [f"| {name} | no time left | – | – | – |" for name in session.left_out]
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
    record: dict[str, Any] = {"about": about, "settings": {k: str(v) for k, v in vars(options).items()}, "networks": []}
    sessions: list[Session] = []

    def save() -> None:
        record["networks"] = [session.as_record() for session in sessions]
        if options.json:
            options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    with one_process(options.device):
        for size in sizes_for(options.size):
            with tempfile.TemporaryDirectory(prefix="gpu-benchmark-") as folder:
                bench = Bench(
                    Path(folder) / "demo", size=size, device=options.device, accumulation=options.accumulation
                )
                sessions.append(Session(bench, size, options, deadline=deadline, save=save))
                sessions[-1].run()
            print(f"\n{render_ratios(sessions[-1])}\n", flush=True)
    firsts = [(session.size.text_layers, session.results[0]) for session in sessions]
    if len(firsts) == 2 and not any(result.problem for _, result in firsts):
        (a, few), (b, many) = firsts
        whole_s = extrapolate(few, many, layers=(a, b), whole=28)
        record["extrapolated"] = {"layers": 28, "micro_step_s": whole_s}
        print(f"28 layers, extrapolated from {a} and {b}: {whole_s:.3f} s a micro-step")
    save()


if __name__ == "__main__":
    main()
