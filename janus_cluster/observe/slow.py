"""The slow GPU, link or rank of a run that trains, and its cost: from the nodes' samples and the last logged steps.

A synchronous step takes as long as its slowest rank: what one GPU loses in clock, all of them lose in time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from janus_cluster.observe.progress import Progress
from janus_cluster.preflight.gpu_health import BAD_REASONS, BENIGN_REASONS, OTHER_REASONS
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.health import GpuSample, HealthSample, load_samples
from janus_cluster.run.times import render_duration

# A sample of eight GPUs is 1.2 kB: six hours of them.
_TAIL_BYTES = 1 << 20
# The last five minutes decide; one sample alone may be of a checkpoint.
_WINDOW = 10
_FEWEST = 3
# Sound GPUs of one node differ by 1 to 3 % in clock at their power limit.
_LOW_CLOCK = 0.95
_LATE_SHARE = 0.03
_IDLE = 0x1
_BAD = sum(BAD_REASONS)
_NAMES = {**BAD_REASONS, **{bit: name for bit, name in (BENIGN_REASONS | OTHER_REASONS).items() if bit != _IDLE}}
# Ten minutes of a hardware slowdown in an attempt are a node's fault, wherever they were.
_FEWEST_TO_BLAME = 20

Kind = Literal["gpu", "link", "rank", "unknown"]
GpuName = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Slow:
    """One finding. Units: since epoch seconds; cost_share of a step, 0 to 1, None where it is not known."""

    kind: Kind
    node: str | None
    message: str
    gpu: int | None = None
    rank: int | None = None
    since: float | None = None
    cost_share: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As `status --json` has it."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class _Gpu:
    """The busy samples of one GPU, the newest last, and the clock over the window."""

    samples: Sequence[tuple[float, GpuSample]]
    clock_mhz: float | None


def load_slow(run: RunDir, attempt: int | None, progress: Progress, rank_nodes: Mapping[int, str]) -> tuple[Slow, ...]:
    """What is slow in the attempt now, the dearest first."""
    if attempt is None:
        return ()
    samples = load_health(run, attempt)
    found = [*judge_gpus(samples), *judge_links(samples)]
    if progress.attempt == attempt:
        found += judge_ranks(progress, rank_nodes)
    found += [slow for node, own in samples.items() if (slow := _unread(node, own)) is not None]
    return tuple(sorted(found, key=lambda slow: -(slow.cost_share or 0.0)))


def load_health(run: RunDir, attempt: int) -> dict[str, list[HealthSample]]:
    """Node → the newest samples of the attempt."""
    return {node: load_samples(path, most_bytes=_TAIL_BYTES) for node, path in run.health_files(attempt).items()}


def judge_gpus(samples: Mapping[str, Sequence[HealthSample]]) -> list[Slow]:
    """GPUs whose clock is 5 % or more below that of the others, or that the hardware holds down."""
    gpus = {name: gpu for name, gpu in _busy(samples).items() if len(gpu.samples) >= _FEWEST}
    clocks = [gpu.clock_mhz for gpu in gpus.values() if gpu.clock_mhz is not None]
    typical_mhz = statistics.median(clocks) if len(clocks) > 1 else None
    found = (_judge_gpu(*name, gpu, typical_mhz) for name, gpu in gpus.items())
    return [slow for slow in found if slow is not None]


def _busy(samples: Mapping[str, Sequence[HealthSample]]) -> dict[GpuName, _Gpu]:
    own: dict[GpuName, list[tuple[float, GpuSample]]] = {}
    for node, taken in samples.items():
        for sample in taken:
            for gpu in sample.gpus:
                if not (gpu.reasons or 0) & _IDLE:
                    own.setdefault((node, gpu.gpu), []).append((sample.time, gpu))
    return {name: _Gpu(samples=found, clock_mhz=_clock(found[-_WINDOW:])) for name, found in own.items()}


def _clock(samples: Sequence[tuple[float, GpuSample]]) -> float | None:
    known = [gpu.sm_mhz for _, gpu in samples if gpu.sm_mhz is not None]
    return statistics.median(known) if known else None


def _judge_gpu(node: str, index: int, gpu: _Gpu, typical_mhz: float | None) -> Slow | None:
    window = [sample for _, sample in gpu.samples[-_WINDOW:]]
    limit_mhz = _LOW_CLOCK * typical_mhz if typical_mhz else 0.0
    is_low = gpu.clock_mhz is not None and gpu.clock_mhz < limit_mhz
    is_held = _num_with(_BAD, window) * 2 >= len(window)
    if not is_low and not is_held:
        return None
    reasons = [name for bit, name in _NAMES.items() if _num_with(bit, window) * 2 >= len(window)]
    since = _since(gpu.samples, limit_mhz)
    cost = 1 - gpu.clock_mhz / typical_mhz if gpu.clock_mhz and typical_mhz else 0.0
    clock = f"SM clock {gpu.clock_mhz:.0f} MHz" if gpu.clock_mhz is not None else "SM clock not reported"
    clock += f" (the others: {typical_mhz:.0f})" if typical_mhz else ""
    price = f": up to {cost:.0%} of a step" if cost >= 0.01 else ""
    why, when = ", ".join(reasons) or "no reason reported", _render_since(since, gpu.samples[-1][0])
    message = f"{node} GPU {index}: {why}, {clock}, {when}{price}"
    return Slow(
        kind="gpu", node=node, gpu=index, message=message, since=since, cost_share=cost if cost >= 0.01 else None
    )


def _num_with(bits: int, samples: Sequence[GpuSample]) -> int:
    """How many of the samples have one of the reasons."""
    return sum(bool((sample.reasons or 0) & bits) for sample in samples)


def _since(samples: Sequence[tuple[float, GpuSample]], limit_mhz: float) -> float:
    """When the state began that lasts until the newest sample."""
    begun = samples[-1][0]
    for taken_at, sample in reversed(samples):
        if not (sample.reasons or 0) & _BAD and (sample.sm_mhz is None or sample.sm_mhz >= limit_mhz):
            break
        begun = taken_at
    return begun


def _render_since(since: float, until: float) -> str:
    return f"since {time.strftime('%H:%M', time.localtime(since))} ({render_duration(until - since)})"


def judge_links(samples: Mapping[str, Sequence[HealthSample]]) -> list[Slow]:
    """Ports whose error counters grew in the last five minutes."""
    found = []
    for node, taken in samples.items():
        if len(taken) < 2:
            continue
        before, now = taken[-min(_WINDOW, len(taken))].link_errors, taken[-1].link_errors
        for port, counters in now.items():
            if dict(counters) != dict(before.get(port, {})):
                grown = ", ".join(f"{name} +{n}" for name, n in counters.items())
                found.append(
                    Slow(kind="link", node=node, message=f"{node} {port}: {grown} since training began, still growing")
                )
    return found


def judge_ranks(progress: Progress, nodes: Mapping[int, str]) -> list[Slow]:
    """The rank that joins each step's first collective last, where the others wait for it for 3 % of a step or more."""
    joined, step_s = progress.median_ranks.get("first_collective_s", ()), progress.median_step_time_s
    if len(joined) < 2 or not step_s:
        return []
    rank = max(range(len(joined)), key=lambda r: joined[r])
    cost_s = joined[rank] - statistics.median_low(joined)
    if not cost_s >= _LATE_SHARE * step_s:
        return []
    waits = progress.median_ranks.get("data_wait_s", ())
    is_data = len(waits) == len(joined) and waits[rank] > joined[rank] / 2
    place = f"rank {rank}" + (f" on {nodes[rank]}" if rank in nodes else "")
    cause = "waiting for data" if is_data else "not waiting for data"
    message = (
        f"{place} is the last to a step's first collective ({cause}): the others wait {cost_s:.2f} s, "
        f"{cost_s / step_s:.0%} of a step"
    )
    return [Slow(kind="rank", node=nodes.get(rank), rank=rank, message=message, cost_share=cost_s / step_s)]


def _unread(node: str, samples: Sequence[HealthSample]) -> Slow | None:
    """A node whose GPUs cannot be sampled any more is not taken for a sound one."""
    problem = next((sample.problem for sample in reversed(samples) if sample.problem), None)
    if problem is None or samples[-1].gpus:
        return None
    return Slow(kind="unknown", node=node, message=f"{node}: its GPUs are not sampled: {problem}")


def throttled_gpus(samples: Mapping[str, Sequence[HealthSample]]) -> dict[str, tuple[float, str]]:
    """Node → (time of the last sample, what to hold against it): the hardware held a GPU's clock down half the time."""
    found: dict[str, tuple[float, str]] = {}
    for (node, index), gpu in _busy(samples).items():
        own = [sample for _, sample in gpu.samples]
        if len(own) < _FEWEST_TO_BLAME or _num_with(_BAD, own) * 2 < len(own):
            continue
        names = [name for bit, name in BAD_REASONS.items() if any((s.reasons or 0) & bit for s in own)]
        text = f"GPU {index}: {', '.join(names)} in {_num_with(_BAD, own)} of {len(own)} samples while it trained"
        found.setdefault(node, (gpu.samples[-1][0], text))
    return found
