"""One device at work, and the devices of one node together: GEMM and intra-node all-reduce of the probe."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from janus_cluster.training.probe_timing import Payload, local_world_size, time_all_reduce, timed
from janus_cluster.training.world import World, gather


def measure_gemm(world: World, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every rank's n×n×n product, all ranks at once. Returns: one record per rank of the world, in their order.

    Units:   TFLOP/s = 2n³ / median seconds / 1e12.
    """
    n, dtype = int(settings["size"]), getattr(torch, settings["dtype"])
    generator = torch.Generator(device=world.device).manual_seed(0)
    left, right = (
        torch.randn(n, n, generator=generator, device=world.device, dtype=torch.float32).to(dtype) for _ in range(2)
    )
    first, product = left @ right, torch.empty_like(left)
    times_s = []
    for iteration in range(int(settings["warmups"]) + int(settings["iterations"])):
        elapsed_s = timed(world, lambda: torch.matmul(left, right, out=product))
        if iteration >= int(settings["warmups"]):
            times_s.append(elapsed_s)
    # The same product on the same device is the same to the bit; a differing one was computed wrongly.
    consistent = bool(torch.isfinite(first).all()) and bool(torch.equal(first, product))
    record = {
        "rank": world.rank,
        "local_rank": world.local_rank,
        "tflops": 2 * n**3 / statistics.median(times_s) / 1e12,
        "consistent": consistent,
    }
    return gather(record)


def measure_intra_node(world: World, settings: Mapping[str, Any], *, warmups: int, iterations: int) -> Any:
    """The all-reduce over the ranks of this node, while every node does the same. None with one rank per node."""
    size = local_world_size()
    if size < 2:
        return None
    node = world.rank // size
    # Every rank takes part in the making of every group, also of those that it is not in.
    groups = [dist.new_group(list(range(k * size, (k + 1) * size))) for k in range(world.world_size // size)]
    payload = Payload(round(float(settings["payload_mb"]) * 1e6), world.device)
    times_s, sum_correct = time_all_reduce(
        world,
        payload,
        warmups=warmups,
        iterations=iterations,
        group=groups[node],
        place=world.local_rank,
        size=size,
    )
    mine = {"times_s": times_s, "sum_correct": sum_correct}
    of_node = gather(mine)[node * size : (node + 1) * size]
    return {
        "times_s": [max(same) for same in zip(*(r["times_s"] for r in of_node), strict=True)],
        "sum_correct": all(r["sum_correct"] for r in of_node),
        "num_ranks": size,
        "payload_bytes": payload.payload_bytes,
    }
