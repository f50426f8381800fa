"""All-reduce over every rank, timed and checked: python -m janus_cluster.training.probe RUN_DIR --attempt 1 --node N

Runs under torchrun before training, on the same ranks and over the same network. It measures only; judging is
done where no torch is needed.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from janus_cluster.config.schema import ResolvedJob
from janus_cluster.errors import UsageError
from janus_cluster.rundir import RunDir, write_json_atomically
from janus_cluster.training.world import World, load_world, process_group, run_and_leave

BYTES_PER_ELEMENT = 4


def time_all_reduce(world: World, *, payload_bytes: int, warmups: int, iterations: int) -> tuple[list[float], bool]:
    """Every rank has summed the same fp32 payload `warmups + iterations` times.

    Units:   seconds per timed all-reduce, on this rank, from a barrier to the end of the sum.
    Returns: the times of the timed ones, and whether every element of every sum was right.
    """
    num_elements = max(1, payload_bytes // BYTES_PER_ELEMENT)
    # Small whole numbers: every partial sum is exact in fp32, so the order of the additions cannot matter.
    pattern = torch.arange(num_elements, device=world.device, dtype=torch.float32).remainder_(1024)
    expected = pattern * world.world_size + world.world_size * (world.world_size - 1) / 2
    times_s: list[float] = []
    sum_correct = True
    for iteration in range(warmups + iterations):
        payload = pattern + world.rank
        dist.barrier()
        _synchronize(world)
        start_s = time.perf_counter()
        dist.all_reduce(payload)
        _synchronize(world)
        if iteration >= warmups:
            times_s.append(time.perf_counter() - start_s)
        sum_correct = sum_correct and bool(torch.equal(payload, expected))
    return times_s, sum_correct


def gather_over_ranks(world: World, value: Any) -> list[Any]:
    """What every rank passed, in the order of the ranks, on every rank."""
    values: list[Any] = [None] * world.world_size
    dist.all_gather_object(values, value)
    return values


def measure_all_reduce(
    world: World, *, node: str, payload_bytes: int, warmups: int = 3, iterations: int = 10
) -> dict[str, Any]:
    """The record for `RunDir.all_reduce_json`: an iteration takes as long as its slowest rank; every sum was checked.

    Raises: UsageError if nothing would be timed.
    """
    if iterations < 1:
        raise UsageError(f"--iterations {iterations}: at least 1 is needed", hint="leave --iterations away")
    times_s, sum_correct = time_all_reduce(world, payload_bytes=payload_bytes, warmups=warmups, iterations=iterations)
    reports = gather_over_ranks(world, {"host": socket.gethostname(), "times_s": times_s, "sum_correct": sum_correct})
    return {
        "schema_version": 1,
        "node": node,
        "world_size": world.world_size,
        "backend": world.backend,
        "payload_bytes": max(1, payload_bytes // BYTES_PER_ELEMENT) * BYTES_PER_ELEMENT,
        "times_s": [max(same_iteration) for same_iteration in zip(*(r["times_s"] for r in reports), strict=True)],
        "sum_correct": all(r["sum_correct"] for r in reports),
        "ranks": [r["host"] for r in reports],
    }


def _synchronize(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m janus_cluster.training.probe", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--node", required=True)
    parser.add_argument("--payload-mb", type=float, help="MB of 1e6 bytes; default: what the job says")
    parser.add_argument("--warmups", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=10)
    return parser.parse_args(argv)


@record
def main(argv: Sequence[str] | None = None) -> None:
    """Measure over all ranks; the first rank of each node writes that node's record."""
    arguments = _parse_arguments(argv)
    run = RunDir(arguments.run_dir)
    resolved = ResolvedJob.load(run.resolved_json.read_text(encoding="utf-8"))
    payload_mb = arguments.payload_mb or resolved.job.preflight.all_reduce_mb
    if payload_mb is None:
        payload_mb = float(resolved.preflight_thresholds["all_reduce"]["payload_mb"])
    world = load_world(resolved.job.hardware.device)
    with process_group(world, timeout_s=resolved.job.preflight.timeout_s):
        report = measure_all_reduce(
            world,
            node=arguments.node,
            payload_bytes=round(payload_mb * 1e6),
            warmups=arguments.warmups,
            iterations=arguments.iterations,
        )
    if world.is_node_main:
        path = run.all_reduce_json(arguments.attempt, arguments.node)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomically(path, report)
        print(
            f"all-reduce {report['payload_bytes'] / 1e6:g} MB over {world.world_size} ranks ({world.backend}): "
            f"median {statistics.median(report['times_s']) * 1e3:.1f} ms, "
            f"sum {'correct' if report['sum_correct'] else 'WRONG'}",
            flush=True,
        )


if __name__ == "__main__":
    run_and_leave(main)
