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
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from benchmarks.counting import HostWaits
from benchmarks.gpu_timeline import Timeline
from benchmarks.ways import OURS, PREDECESSOR, SEED, Bench, Rig, Size, Way, describe, one_process
from janus_cluster.config.networks import PRESETS
from janus_cluster.plan.flops import Flops, Work, count_flops
from janus_cluster.plan.hardware import GPUS
from janus_cluster.plan.sample import plan_sample
from janus_cluster.plan.sizes import TINY_VOCABULARY, Sizes, sizes_of
from janus_cluster.training.entry import quiet_libraries
from janus_cluster.training.held_out import move_to
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


@dataclass
class Result:
    """One way, measured; times in seconds of a micro-step with its share of the optimizer's."""

    name: str
    way: dict[str, Any]
    rows: int
    step_s: list[float] = field(default_factory=list)
    data_wait_s: float = 0.0
    parts_s: dict[str, float] = field(default_factory=dict)
    samples_per_s: float = 0.0
    tokens_per_s: float = 0.0
    tflops_per_s: float = 0.0
    mfu: float | None = None
    peak_gb: float = 0.0
    host_waits: int = 0
    waits_at: dict[str, int] = field(default_factory=dict)
    kernel_launches: int = 0
    loss: float = 0.0
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class Lever:
    """`switch` turns ours into the way without the lever, on the same engine; another engine where it cannot."""

    name: str
    off: Way
    same_engine: bool
    rows: int = 1


def levers(device: str, with_compile: bool) -> list[Lever]:
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
        Lever(name="everything (off: the predecessor)", off=PREDECESSOR, same_engine=False),
    ]


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


@contextmanager
def watched(rig: Rig, timeline: Timeline) -> Iterator[None]:
    """Forward passes of the parts enter and leave the timeline."""
    model = rig.engine.module
    vggt = model._modules.get("vggt_inside") or model.vggt
    parts: list[tuple[nn.Module, str]] = [
        (model.model.visual, "ViT"),
        (vggt, "VGGT"),
        (vggt.patch_embed, "DINO"),
        (model.model.language_model, "LLM forward"),
    ]
    handles = []
    for module, name in parts:
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: timeline.enter(name)))
        handles.append(module.register_forward_hook(lambda *_: timeline.leave()))
    # After the language model there is nothing but heads and loss.
    handles.append(model.model.language_model.register_forward_hook(lambda *_: timeline.rename("heads and loss")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Feed:
    """Micro-batches from loader processes, pinned, for ever."""

    def __init__(self, rig: Rig, *, rows: int, workers: int) -> None:
        count = len(rig.bench.samples)
        batches = [[(row + rows * n) % count for row in range(rows)] for n in range(10_000)]
        self._loader: Any = DataLoader(
            rig.dataset,
            batch_sampler=batches,
            collate_fn=rig.collate,
            num_workers=workers,
            pin_memory=rig.bench.device.type == "cuda",
        )
        self._batches: Iterator[dict[str, Any]] = iter(self._loader)
        self.waited_s = 0.0

    def next(self) -> dict[str, Any]:
        begun = time.perf_counter()
        batch = next(self._batches)
        self.waited_s += time.perf_counter() - begun
        return batch


def train_step(rig: Rig, feed: Feed, timeline: Timeline) -> tuple[torch.Tensor, int]:
    """One optimizer step. Returns: its loss, still on the device, and the tokens of its micro-batches."""
    total, tokens = torch.zeros((), device=rig.bench.device), 0
    for _ in range(rig.bench.accumulation):
        batch = feed.next()
        tokens += batch["input_ids"].numel()
        with timeline.within("host to device"):
            batch = move_to(batch, rig.bench.device)
        with timeline.within("merge and embed"):
            loss = rig.engine(**batch).loss
        with timeline.within("backward"):
            rig.engine.backward(loss)
        with timeline.within("optimizer"):
            rig.engine.step()
        total += loss.detach() / rig.bench.accumulation
    return total, tokens


def measure(rig: Rig, name: str, way: Way, *, rows: int, options: argparse.Namespace, flops: Flops) -> Result:
    """`way` on this engine: timed steps without any hook, then one step each for parts, waits and launches."""
    result = Result(name=name, way=asdict(way), rows=rows)
    cuda = rig.bench.device.type == "cuda"
    feed = Feed(rig, rows=rows, workers=options.workers)
    off = Timeline(None)
    for _ in range(options.warm_up):
        loss, _ = train_step(rig, feed, off)
    result.loss = float(loss)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    feed.waited_s, tokens = 0.0, 0
    for _ in range(options.steps):
        begun = time.perf_counter()
        _, seen = train_step(rig, feed, off)
        _synchronise(cuda)
        result.step_s.append((time.perf_counter() - begun) / rig.bench.accumulation)
        tokens += seen
    num_micro_steps = options.steps * rig.bench.accumulation
    step_s = statistics.median(result.step_s)
    result.data_wait_s = feed.waited_s / num_micro_steps
    result.samples_per_s = rows / step_s
    result.tokens_per_s = tokens / num_micro_steps / step_s
    result.tflops_per_s = flops.model / 1e12 * result.samples_per_s
    result.mfu = result.tflops_per_s / options.peak_tflops if options.peak_tflops else None
    rss_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    result.peak_gb = torch.cuda.max_memory_allocated() / 1e9 if cuda else rss_gb
    _look_inside(rig, feed, result)
    return result


def _look_inside(rig: Rig, feed: Feed, result: Result) -> None:
    """Parts, waits and kernel launches of a micro-step; none of it disturbs the timed steps."""
    cuda, per_step = rig.bench.device.type == "cuda", rig.bench.accumulation
    timeline = Timeline(rig.bench.device.type)
    with watched(rig, timeline):
        train_step(rig, feed, timeline)
    result.parts_s = {part: seconds / per_step for part, seconds in timeline.seconds().items()}
    counted = _count_cuda_waits if cuda else _count_host_waits
    result.host_waits, result.waits_at = counted(lambda: train_step(rig, feed, Timeline(None)))
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities) as profiled:
        train_step(rig, feed, Timeline(None))
        _synchronise(cuda)
    marks = ("LaunchKernel", "GraphLaunch") if cuda else ("aten::",)
    launches = sum(e.count for e in profiled.key_averages() if any(mark in e.key for mark in marks))
    result.host_waits = round(result.host_waits / per_step)
    result.kernel_launches = round(launches / per_step)


def _count_host_waits(step: Callable[[], object]) -> tuple[int, dict[str, int]]:
    with HostWaits() as waits:
        step()
    return sum(waits.at.values()), dict(waits.at.most_common(20))


def _count_cuda_waits(step: Callable[[], object]) -> tuple[int, dict[str, int]]:
    """torch warns of every wait; the line that waited is counted."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    at: dict[str, int] = {}
    for warning in caught:
        if "synchroniz" in str(warning.message):
            place = f"{Path(warning.filename).parent.name}/{Path(warning.filename).name}:{warning.lineno}"
            at[place] = at.get(place, 0) + 1
    return sum(at.values()), dict(sorted(at.items(), key=lambda item: -item[1])[:20])


def _synchronise(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


class Session:
    """Engines one after the other on one GPU, within the time that there is."""

    def __init__(self, bench: Bench, size: Size, options: argparse.Namespace, deadline: float) -> None:
        self.bench, self.size, self.options, self.deadline = bench, size, options, deadline
        self.results: list[Result] = []
        self.ratios: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self._longest_s = 0.0

    def run(self) -> None:
        """Ours, then every lever that there is time for."""
        chosen = [x for x in levers(self.options.device, self.options.compile) if self._wanted(x)]
        with self._engine(OURS) as rig:
            ours = self._measure(rig, "ours", OURS, rows=1)
            for lever in [lever for lever in chosen if lever.same_engine]:
                self._on_same_engine(rig, lever)
        for lever in [lever for lever in chosen if not lever.same_engine]:
            if not self._time_left(lever.name):
                continue
            with self._engine(lever.off) as other:
                result = self._measure(other, lever.name, lever.off, rows=1)
            self._compare(lever.name, [result], [ours])

    def _on_same_engine(self, rig: Rig | None, lever: Lever) -> None:
        """Off, on, off, on: what the GPU's clock does meanwhile meets both."""
        if rig is None or not self._time_left(lever.name):
            return
        off, on = [], []
        for _ in range(self.options.pairs):
            switch(rig, lever.off)
            off.append(self._measure(rig, f"{lever.name}: other", lever.off, rows=lever.rows))
            switch(rig, OURS)
            on.append(self._measure(rig, f"{lever.name}: ours", OURS, rows=1))
        self._compare(lever.name, off, on)

    def _compare(self, name: str, off: Sequence[Result], on: Sequence[Result]) -> None:
        if any(r.problem for r in (*off, *on)):
            return
        ratios = [b.samples_per_s / a.samples_per_s for a, b in zip(off, on, strict=True)]
        found = {"lever": name, "ratio": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
        self.ratios.append(found | {"peak_gb": [off[0].peak_gb, on[0].peak_gb], "loss": [off[0].loss, on[0].loss]})

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
        self._longest_s = max(self._longest_s, time.perf_counter() - begun)
        self.results.append(result)
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


def render_result(result: Result) -> str:
    """One line."""
    if result.problem:
        return f"{result.name}: {result.problem}"
    spread = f"{min(result.step_s):.3f}–{max(result.step_s):.3f}"
    mfu = "" if result.mfu is None else f" {result.mfu:.1%} MFU"
    parts = ", ".join(f"{name} {seconds * 1e3:.0f}" for name, seconds in result.parts_s.items())
    return (
        f"{result.name}: {statistics.median(result.step_s):.3f} s ({spread}), {result.samples_per_s:.2f} samples/s, "
        f"{result.tflops_per_s:.1f} TFLOP/s{mfu}, {result.peak_gb:.1f} GB, "
        f"data wait {result.data_wait_s * 1e3:.1f} ms, {result.host_waits} waits, {result.kernel_launches} launches; ms: {parts}"
    )


def render_ratios(session: Session) -> str:
    """Markdown, a row a lever."""
    lines = [
        "| lever | ours against the other, samples/s | min–max | peak GB other → ours |",
        "| --- | --- | --- | --- |",
    ]
    for found in session.ratios:
        memory = " → ".join(f"{gb:.1f}" for gb in found["peak_gb"])
        lines.append(f"| {found['lever']} | {found['ratio']:.2f} | {found['min']:.2f}–{found['max']:.2f} | {memory} |")
    lines += [f"| {name} | no time left | – | – |" for name in session.left_out]
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
    firsts: list[tuple[int, Result]] = []
    with one_process(options.device):
        for size in sizes_for(options.size):
            with tempfile.TemporaryDirectory(prefix="gpu-benchmark-") as folder:
                bench = Bench(
                    Path(folder) / "demo", size=size, device=options.device, accumulation=options.accumulation
                )
                session = Session(bench, size, options, deadline)
                session.run()
            firsts.append((size.text_layers, session.results[0]))
            record["networks"].append(
                {
                    "size": {k: str(v) for k, v in asdict(size).items()},
                    "flops_per_sample": session._flops(OURS).tflop(),
                    "results": [asdict(result) for result in session.results],
                    "ratios": session.ratios,
                    "left_out": session.left_out,
                }
            )
            print(f"\n{render_ratios(session)}\n", flush=True)
    if len(firsts) == 2 and not any(result.problem for _, result in firsts):
        (a, few), (b, many) = firsts
        whole_s = extrapolate(few, many, layers=(a, b), whole=28)
        record["extrapolated"] = {"layers": 28, "micro_step_s": whole_s}
        print(f"28 layers, extrapolated from {a} and {b}: {whole_s:.3f} s a micro-step")
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
