"""One way of computing a step, measured on one device: speed, memory, time by part, waits, kernel launches."""

from __future__ import annotations

import argparse
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from benchmarks.counting import HostWaits
from benchmarks.gpu_timeline import Timeline
from benchmarks.ways import Rig, Way
from janus_cluster.janusvln.held_out import move_to
from janus_cluster.plan.flops import Flops

BUSIEST = 15


@dataclass
class Result:
    """One way, measured; times in seconds of a micro-step with its share of the optimizer's.

    parts_s: a step of its own, split; its parts add up to `split_step_s`. On one process there is no communication.
    busiest_s: kernels (operators on a CPU) by the time they take themselves, `all` of them first; several streams may
        run at once. worker_s: what one loader process takes for a micro-batch.
    kernel_launches: None where the profiler saw no launch, which is a profiler that does not work, not a fast step.
    problem: why there is no measurement. unseen: what of it is missing, and why.
    """

    name: str
    way: dict[str, Any]
    rows: int
    step_s: list[float] = field(default_factory=list)
    data_wait_s: float = 0.0
    worker_s: float = 0.0
    parts_s: dict[str, float] = field(default_factory=dict)
    split_step_s: float = 0.0
    busiest_s: dict[str, float] = field(default_factory=dict)
    samples_per_s: float = 0.0
    tokens_per_s: float = 0.0
    tflops_per_s: float = 0.0
    mfu: float | None = None
    peak_gb: float = 0.0
    reserved_gb: float | None = None
    host_waits: int | None = None
    waits_at: dict[str, int] = field(default_factory=dict)
    kernel_launches: int | None = None
    first_loss: float = 0.0
    problem: str | None = None
    unseen: list[str] = field(default_factory=list)


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
    """Micro-batches from loader processes, pinned, without end."""

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
        with timeline.within("waiting for data"):
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
    # Else the first timed step would wait for the last of these.
    _synchronise(cuda)
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
    result.reserved_gb = torch.cuda.max_memory_reserved() / 1e9 if cuda else None
    _look_inside(rig, feed, result)
    return result


def _look_inside(rig: Rig, feed: Feed, result: Result) -> None:
    """Parts, waits and kernel launches of a micro-step; none of it disturbs the timed steps, and none of it is worth
    losing them: what cannot be seen is named."""
    for look in (_split, _count_waits, _profile):
        try:
            look(rig, feed, result)
        except Exception as error:
            result.unseen.append(f"{look.__name__.strip('_')}: {type(error).__name__}: {first_line(error)}")


def _split(rig: Rig, feed: Feed, result: Result) -> None:
    cuda, per_step = rig.bench.device.type == "cuda", rig.bench.accumulation
    timeline = Timeline(rig.bench.device.type)
    with watched(rig, timeline):
        begun = time.perf_counter()
        train_step(rig, feed, timeline)
        _synchronise(cuda)
        result.split_step_s = (time.perf_counter() - begun) / per_step
    result.parts_s = {part: seconds / per_step for part, seconds in timeline.seconds().items()}
    begun = time.perf_counter()
    rig.collate([rig.dataset[row] for row in range(result.rows)])
    result.worker_s = time.perf_counter() - begun


def _count_waits(rig: Rig, feed: Feed, result: Result) -> None:
    counted = _count_cuda_waits if rig.bench.device.type == "cuda" else _count_host_waits
    waits, result.waits_at = counted(lambda: train_step(rig, feed, Timeline(None)))
    result.host_waits = round(waits / rig.bench.accumulation)


def _profile(rig: Rig, feed: Feed, result: Result) -> None:
    cuda, per_step = rig.bench.device.type == "cuda", rig.bench.accumulation
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities) as profiled:
        train_step(rig, feed, Timeline(None))
        _synchronise(cuda)
    events = list(profiled.key_averages())
    launches = count_launches([(event.key, event.count) for event in events], cuda=cuda)
    if not launches:
        raise RuntimeError("no launch among the events: is CUPTI allowed here?")
    result.kernel_launches = round(launches / per_step)
    spent = [
        (event.key, event.self_device_time_total if cuda else event.self_cpu_time_total)
        for event in events
        if (event.device_type == DeviceType.CUDA) == cuda and not event.is_user_annotation
    ]
    spent.sort(key=lambda item: -item[1])
    whole = ("all", sum(microseconds for _, microseconds in spent))
    result.busiest_s = {name[:120]: us / 1e6 / per_step for name, us in (whole, *spent[:BUSIEST])}


def count_launches(counts: Iterable[tuple[str, int]], *, cuda: bool) -> int:
    """Kernels and graphs that the host launched, of all events by name; on a CPU: operators."""
    # cudaLaunchKernel, cudaLaunchKernelExC, cudaLaunchCooperativeKernel, cuLaunchKernel, cuLaunchKernelEx, …GraphLaunch
    marks = ("LaunchKernel", "LaunchCooperativeKernel", "GraphLaunch") if cuda else ("aten::",)
    return sum(count for key, count in counts if any(mark in key for mark in marks))


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


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
        if "called a synchronizing" in str(warning.message):
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
    unseen = "".join(f"; not seen: {what}" for what in result.unseen)
    parts = ", ".join(f"{name} {seconds * 1e3:.0f}" for name, seconds in result.parts_s.items())
    return (
        f"{result.name}: {statistics.median(result.step_s):.3f} s ({spread}), {result.samples_per_s:.2f} samples/s, "
        f"{result.tflops_per_s:.3g} TFLOP/s{mfu}, {result.peak_gb:.1f} GB, "
        f"data wait {result.data_wait_s * 1e3:.1f} ms, {result.host_waits} waits, {result.kernel_launches} launches; "
        f"ms: {parts}{unseen}"
    )
