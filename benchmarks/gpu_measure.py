"""One way of computing a step, measured on one device: speed, memory, time by part, waits, kernel launches."""

from __future__ import annotations

import argparse
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from benchmarks.counting import HostWaits
from benchmarks.gpu_timeline import Timeline
from benchmarks.ways import Rig, Way
from janus_cluster.plan.flops import Flops
from janus_cluster.training.held_out import move_to


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
    first_loss: float = 0.0
    problem: str | None = None


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
    for number in range(options.warm_up):
        loss, _ = train_step(rig, feed, off)
        if number == 0:
            result.first_loss = float(loss)
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


@torch.no_grad()
def loss_now(rig: Rig) -> float:
    """The loss of the first sample with the weights as they are."""
    batch = move_to(rig.collate([rig.dataset[0]]), rig.bench.device)
    return float(rig.engine.module(**batch).loss)


def _synchronise(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


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
        f"data wait {result.data_wait_s * 1e3:.1f} ms, {result.host_waits} waits, {result.kernel_launches} launches; "
        f"ms: {parts}"
    )
