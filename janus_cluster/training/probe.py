"""What the devices and the network of this job can do, measured and not judged.

    python -m janus_cluster.training.probe RUN_DIR --attempt 1 --node N

Runs under torchrun before training, on the same ranks and over the same network: GEMM on each device, the all-reduce
within each node, each rail between pairs of nodes, and the all-reduce over all ranks. Judging is done where no
torch is needed.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from janus_cluster.errors import UsageError
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.bundle import load_resolved
from janus_cluster.run.records.gate import AllReduceRecord, RailsRecord
from janus_cluster.run.stamped import stamp_output
from janus_cluster.run.text import counted
from janus_cluster.training.probe_device import measure_gemm, measure_intra_node
from janus_cluster.training.probe_rails import measure_rails
from janus_cluster.training.probe_timing import Payload, local_world_size, slowest, time_all_reduce
from janus_cluster.training.world import World, error_recorded, gather, load_world, process_group, run_and_leave


def measure_all_reduce(
    world: World, *, node: str, payload_bytes: int, warmups: int = 3, iterations: int = 10
) -> dict[str, Any]:
    """The record of the all-reduce over all ranks: an iteration takes as long as its slowest rank.

    Raises: UsageError if nothing would be timed.
    """
    if iterations < 1:
        raise UsageError(f"--iterations {iterations}: at least 1 is needed", hint="leave --iterations away")
    payload = Payload(payload_bytes, world.device)
    times_s, sum_correct = time_all_reduce(world, payload, warmups=warmups, iterations=iterations)
    own: dict[str, Any] = {"host": socket.gethostname(), "times_s": times_s, "sum_correct": sum_correct}
    reports = gather(own)
    return {
        "schema_version": 1,
        "node": node,
        "world_size": world.world_size,
        "backend": world.backend,
        "payload_bytes": payload.payload_bytes,
        "times_s": slowest([r["times_s"] for r in reports]),
        "sum_correct": all(r["sum_correct"] for r in reports),
        "ranks": [r["host"] for r in reports],
    }


def load_rails(path: Path, node: str) -> list[dict[str, str]]:
    """The rails that the attempt found between the nodes, each with the interface as `node` calls it; [] if none."""
    if not path.exists():
        return []
    return [{"name": r.name, "interface": r.interfaces.get(node, "")} for r in RailsRecord.require(path).rails]


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m janus_cluster.training.probe", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--bundle", type=int, required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--node", required=True)
    parser.add_argument("--payload-mb", type=float, help="MB of 1e6 bytes; default: the job's")
    parser.add_argument("--warmups", type=int, help="default: the profile's")
    parser.add_argument("--iterations", type=int, help="default: the profile's")
    return parser.parse_args(argv)


def measure(world: World, resolved: ResolvedJob, run: RunDir, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that this node reports: each device, the node, each rail, and all ranks."""
    profile = resolved.preflight_thresholds
    settings = profile["all_reduce"]
    payload_mb = arguments.payload_mb or resolved.job.preflight.all_reduce_mb or settings["payload_mb"]
    warmups = int(arguments.warmups if arguments.warmups is not None else settings["warmups"])
    iterations = int(arguments.iterations if arguments.iterations is not None else settings["iterations"])
    rails = load_rails(run.rails_json(arguments.attempt), arguments.node)
    begun_s = time.perf_counter()
    first_rank = world.rank - world.local_rank
    parts: dict[str, Any] = {
        "gemm": measure_gemm(world, profile["gemm"])[first_rank : first_rank + local_world_size()],
        "intra_node": measure_intra_node(world, profile["intra_node"], warmups=warmups, iterations=iterations),
        "rails": _measure_rails(world, rails, profile, node=arguments.node) if rails else [],
    }
    whole = measure_all_reduce(
        world,
        node=arguments.node,
        payload_bytes=round(float(payload_mb) * 1e6),
        warmups=warmups,
        iterations=iterations,
    )
    return whole | parts | {"duration_s": time.perf_counter() - begun_s}


def _measure_rails(
    world: World, rails: list[dict[str, str]], profile: Mapping[str, Any], *, node: str
) -> list[dict[str, Any]]:
    baseline = profile.get("baseline") or {}
    floors = {test: baseline["fail_below"] * rate for test, rate in (baseline.get("measured") or {}).items()}
    tests = measure_rails(world, rails, profile["rails"], node=node, baseline=floors)
    return [test.to_json() for test in tests]


@error_recorded
def main(argv: Sequence[str] | None = None) -> None:
    """Measure over all ranks; the first rank of each node writes that node's record."""
    arguments = _parse_arguments(argv)
    stamp_output()
    run = RunDir(arguments.run_dir)
    resolved = load_resolved(run.bundle(arguments.bundle))
    world = load_world(resolved.job.hardware.device)
    with process_group(world, timeout_s=resolved.job.preflight.timeout_s):
        report = measure(world, resolved, run, arguments)
    if world.is_node_main:
        path = run.all_reduce_json(arguments.attempt, arguments.node)
        path.parent.mkdir(parents=True, exist_ok=True)
        AllReduceRecord(values=report).write(path)
        print(
            f"probe: {len(report['gemm'])} GEMM, {len(report['rails'])} tests of rails; all-reduce "
            f"{report['payload_bytes'] / 1e6:g} MB over {counted(world.world_size, 'rank')} ({world.backend}): "
            f"median {statistics.median(report['times_s']) * 1e3:.1f} ms, "
            f"sum {'correct' if report['sum_correct'] else 'WRONG'}; {report['duration_s']:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    run_and_leave(main)
