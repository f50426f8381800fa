"""Timed collectives of the probe: what every rank measures the same way, over any group of ranks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from janus_cluster.training.world import World

BYTES_PER_ELEMENT = 4


class Payload:
    """An fp32 message and the exact sum of it: small whole numbers, so the order of additions cannot matter."""

    def __init__(self, payload_bytes: int, device: torch.device) -> None:
        self.num_elements = max(1, payload_bytes // BYTES_PER_ELEMENT)
        self._pattern = torch.arange(self.num_elements, device=device, dtype=torch.float32).remainder_(1024)
        self.tensor = torch.empty_like(self._pattern)

    @property
    def payload_bytes(self) -> int:
        return self.num_elements * BYTES_PER_ELEMENT

    def fill(self, place: int) -> None:
        """The tensor is what the rank at `place` of its group contributes."""
        torch.add(self._pattern, place, out=self.tensor)

    def is_sum(self, size: int) -> bool:
        """Whether the tensor is the sum over the `size` ranks of a group."""
        return bool(torch.equal(self.tensor, self._pattern * size + size * (size - 1) / 2))


def time_all_reduce(
    world: World,
    payload: Payload,
    *,
    warmups: int,
    iterations: int,
    group: dist.ProcessGroup | None = None,
    place: int | None = None,
    size: int | None = None,
) -> tuple[list[float], bool]:
    """Every rank of `group` (default: all) has summed the payload `warmups + iterations` times.

    Units:   seconds per timed all-reduce, on this rank, from a barrier to the end of the sum.
    Returns: the times of the timed ones, and whether every element of every sum was right.
    """
    place = world.rank if place is None else place
    size = world.world_size if size is None else size
    times_s: list[float] = []
    sum_correct = True
    for iteration in range(warmups + iterations):
        payload.fill(place)
        dist.barrier(group=group)
        elapsed_s = timed(world, lambda: dist.all_reduce(payload.tensor, group=group))
        if iteration >= warmups:
            times_s.append(elapsed_s)
        sum_correct = sum_correct and payload.is_sum(size)
    return times_s, sum_correct


def timed(world: World, work: Callable[[], Any]) -> float:
    """Seconds until the device has finished `work`."""
    synchronize(world)
    start_s = time.perf_counter()
    work()
    synchronize(world)
    return time.perf_counter() - start_s


def synchronize(world: World) -> None:
    """The device has nothing left to do."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def local_world_size() -> int:
    """Ranks on this node, from torchrun's environment."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def slowest(times_of_ranks: list[list[float]]) -> list[float]:
    """One time per iteration: it took as long as its slowest rank."""
    return [max(same_iteration) for same_iteration in zip(*times_of_ranks, strict=True)]
