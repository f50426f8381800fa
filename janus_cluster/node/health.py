"""Samples this node's GPUs and links while it trains: a process of its own beside torchrun, every 30 s.

    python -m janus_cluster.node.health PARENT_PID FILE --timeout-s 20 [--no-gpus] [--sysfs-root FOLDER]

It ends with torchrun. What it cannot read or write is recorded once, and training goes on without it.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.preflight.gpu import parse_number
from janus_cluster.preflight.gpu_health import parse_reasons
from janus_cluster.preflight.gpu_query import HEALTH, query_gpus
from janus_cluster.preflight.hca import read_counters
from janus_cluster.preflight.sysfs import NodeRoot
from janus_cluster.run.files import name_of_trouble
from janus_cluster.run.parent import end_with_parent
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.health import GpuSample, HealthSample

EVERY_S = 30.0

Counters = Mapping[str, Mapping[str, int]]


def start_sampler(run: RunDir, resolved: ResolvedJob, *, attempt: int, node: str) -> subprocess.Popen[bytes] | None:
    """Start the sampler, which ends with the calling process, also after an execve.

    Returns: its process; None where there is nothing to sample, or it could not be started.
    """
    has_gpus, has_links = (bool(resolved.preflight_thresholds[key]["wanted"]) for key in ("gpu", "hca"))
    if not has_gpus and not has_links:
        return None
    gate = resolved.job.preflight
    argv = [sys.executable, "-m", "janus_cluster.node.health", str(os.getpid()), str(run.health_jsonl(attempt, node))]
    argv += ["--timeout-s", str(gate.command_timeout_s)]
    argv += [] if has_gpus else ["--no-gpus"]
    argv += ["--sysfs-root", gate.sysfs_root] if gate.sysfs_root else []
    try:
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"health: the sampler cannot be started: {name_of_trouble(error)}", flush=True)
        return None


class Sampler:
    """Takes one sample after another. A program that hung once is not run again: each run would leave a process."""

    def __init__(self, *, root: NodeRoot, timeout_s: float, has_gpus: bool) -> None:
        self._root, self._timeout_s, self._has_gpus = root, timeout_s, has_gpus
        self._first: Counters = read_counters(root)
        self._problem: str | None = None

    def take(self, *, now: float) -> HealthSample:
        """The node at this moment."""
        gpus, problem = self._read_gpus() if self._has_gpus else ((), self._problem)
        is_new = problem is not None and problem != self._problem
        self._problem = problem
        grown = link_errors(self._first, read_counters(self._root))
        return HealthSample(time=now, gpus=gpus, link_errors=grown, problem=problem if is_new else None)

    def _read_gpus(self) -> tuple[tuple[GpuSample, ...], str | None]:
        table = query_gpus(HEALTH, timeout_s=self._timeout_s)
        self._has_gpus = table["error"] is None
        damaged = table["damaged"]
        problem = table["problem"] or (f"nvidia-smi: not parsed: {damaged[0]}" if damaged else None)
        return tuple(parse_gpu(row) for row in table["rows"]), problem


def parse_gpu(row: Mapping[str, str]) -> GpuSample:
    """The sample that a row of nvidia-smi is."""

    def number(name: str) -> float | None:
        return parse_number(row.get(name, ""))

    return GpuSample(
        gpu=int(row["index"]),
        sm_mhz=number("clocks.current.sm"),
        sm_max_mhz=number("clocks.max.sm"),
        power_w=number("power.draw"),
        temperature_c=number("temperature.gpu"),
        memory_used_mib=number("memory.used"),
        reasons=parse_reasons(row),
    )


def link_errors(first: Counters, now: Counters) -> dict[str, dict[str, int]]:
    """By how much each counter has grown. One that was set back meanwhile is counted from 0."""
    found: dict[str, dict[str, int]] = {}
    for port, counters in now.items():
        before = first.get(port, {})
        grown = {k: n - before[k] if n >= before[k] else n for k, n in counters.items() if k in before}
        if any(grown.values()):
            found[port] = {k: n for k, n in grown.items() if n}
    return found


def sample_until_killed(sampler: Sampler, path: Path, *, every_s: float) -> None:
    """`path` has a line more every `every_s` seconds. What cannot be written is lost."""
    trouble = None
    while True:
        sample = sampler.take(now=time.time())
        try:
            path.parent.mkdir(exist_ok=True)
            sample.append(path)
            trouble = None
        except OSError as error:
            if trouble != (trouble := name_of_trouble(error)):
                print(f"health: {path}: {trouble}", flush=True)
        time.sleep(every_s)


def main(argv: Sequence[str] | None = None) -> None:
    """Sample until the parent ends."""
    parser = argparse.ArgumentParser(prog="python -m janus_cluster.node.health", description=__doc__)
    parser.add_argument("parent", type=int)
    parser.add_argument("path", type=Path)
    parser.add_argument("--timeout-s", type=float, required=True)
    parser.add_argument("--every-s", type=float, default=EVERY_S)
    parser.add_argument("--no-gpus", action="store_true")
    parser.add_argument("--sysfs-root")
    args = parser.parse_args(argv)
    # Slurm signals all processes of a step; the ranks go on to save, and are sampled meanwhile.
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    if not end_with_parent(args.parent):
        return
    # Training's threads come first.
    os.nice(10)
    root = NodeRoot.of(args.sysfs_root)
    sampler = Sampler(root=root, timeout_s=args.timeout_s, has_gpus=not args.no_gpus)
    sample_until_killed(sampler, args.path, every_s=args.every_s)


if __name__ == "__main__":
    main()
