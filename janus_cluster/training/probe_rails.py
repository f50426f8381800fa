"""One pair of ranks per rail across two nodes: one rail after the other, then all at once.

On GPUs a rail is GPU k of both nodes, and NCCL takes the HCA beside it. Over gloo a rail is a network interface: the
first rank of each node owns one process group per interface, bound to it, within one process.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from janus_cluster.training.probe_timing import (
    Payload,
    gather_over_ranks,
    local_world_size,
    slowest,
    synchronize,
)
from janus_cluster.training.world import World

# A rail that carries nothing shall not eat the time of the whole gate.
_RAIL_TIMEOUT_S = 10.0
_POLL_S = 0.0002


@dataclass
class Rail:
    """One rail as this rank sees it. `group` is None where this rank has no part in it."""

    name: str
    group: Any = None
    error: str | None = None
    sum_correct: bool = True


def measure_rails(world: World, rails: Sequence[Mapping[str, str]], settings: Mapping[str, Any]) -> list[Any]:
    """A record per rail, the same on every rank: times one by one, again where a rail was slow, and all at once.

    Units:   seconds per all-reduce of `payload_bytes` over two ranks; each as long as its slower end.
    """
    mine = _pair_gpus(world, rails) if world.device.type == "cuda" else _bind_interfaces(world, rails)
    payload_bytes = round(float(settings["payload_mb"]) * 1e6)
    payloads = {rail.name: Payload(payload_bytes, world.device) for rail in mine if rail.group is not None}
    rounds = {"warmups": int(settings["warmups"]), "iterations": int(settings["iterations"])}
    each = [[rail] for rail in mine]
    first = _gather(world, mine, _measure(world, each, payloads, **rounds))
    times_s = {name: found["times_s"] for name, found in first.items()}
    slow = find_slow(times_s, payload_bytes, settings)
    again: dict[str, dict[str, Any]] = {}
    # Machines are noisy: a rail is slow when it is slow every time.
    for _ in range(int(settings["repeats"])):
        suspects = [[rail] for rail in mine if rail.name in slow]
        if not suspects:
            break
        found = _gather(world, mine, _measure(world, suspects, payloads, **rounds))
        again |= found
        slow = find_slow(times_s | {name: found[name]["times_s"] for name in slow}, payload_bytes, settings)
    together = _gather(world, mine, _measure(world, [mine], payloads, **rounds))
    records = []
    for rail in mine:
        passes = [found[rail.name] for found in (first, again, together) if rail.name in found]
        records.append(
            {
                "name": rail.name,
                "payload_bytes": payload_bytes,
                "times_s": first[rail.name]["times_s"],
                "again_s": again[rail.name]["times_s"] if rail.name in again else None,
                "together_s": together[rail.name]["times_s"],
                "sum_correct": all(found["sum_correct"] for found in passes),
                "error": next((found["error"] for found in passes if found["error"]), None),
            }
        )
    return records


def find_slow(times_s: Mapping[str, Sequence[float]], payload_bytes: int, settings: Mapping[str, Any]) -> list[str]:
    """Rails below the profile's floor, or below its share of the median of the other rails."""
    one_of = min if settings.get("statistic") == "best" else statistics.median
    rates = {name: payload_bytes / one_of(t) / 1e9 for name, t in times_s.items() if t}
    floor = float((settings.get("busbw_gb_per_s") or {}).get("fail_below", 0))
    share = float((settings.get("of_median") or {}).get("fail_below", 0))
    slow = []
    for name, rate in rates.items():
        others = [other_rate for other, other_rate in rates.items() if other != name]
        if rate < floor or (others and rate < share * statistics.median(others)):
            slow.append(name)
    return slow


def _pair_gpus(world: World, rails: Sequence[Mapping[str, str]]) -> list[Rail]:
    """GPU k of both nodes as a group of two, for every k. Every rank takes part in the making of every group."""
    size = local_world_size()
    mine = []
    for k, rail in enumerate(rails):
        pair = [k, size + k]
        group = dist.new_group(pair)
        mine.append(Rail(rail["name"], group if world.rank in pair else None))
    return mine


def _bind_interfaces(world: World, rails: Sequence[Mapping[str, str]]) -> list[Rail]:
    """A gloo group of two per interface, bound to it. `rails` name the interface as this node calls it."""
    mine = [Rail(rail["name"]) for rail in rails]
    if not world.is_node_main:
        return mine
    store = _get_default_store()
    for rail, plan in zip(mine, rails, strict=True):
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=_RAIL_TIMEOUT_S)
        try:
            options._devices = [dist.ProcessGroupGloo.create_device(interface=plan["interface"])]
            prefix = PrefixStore(f"rail/{rail.name}", store)
            rail.group = dist.ProcessGroupGloo(prefix, world.rank // local_world_size(), 2, options)
        except RuntimeError as e:
            rail.error = f"{socket.gethostname()}: {str(e).splitlines()[0]}"
    return mine


def _measure(
    world: World, sets: Sequence[Sequence[Rail]], payloads: Mapping[str, Payload], *, warmups: int, iterations: int
) -> dict[str, list[float]]:
    """This rank's times of each rail. The rails of one set run at once, one set after the other.

    In rounds over the sets, so that a burst of other work on the host hits all of them alike.
    """
    times_s: dict[str, list[float]] = {rail.name: [] for rails in sets for rail in rails}
    for iteration in range(warmups + iterations):
        for rails in sets:
            active = [rail for rail in rails if rail.group is not None and rail.error is None]
            for rail in active:
                payloads[rail.name].fill(world.rank // local_world_size())
            dist.barrier()
            elapsed_s = _run(world, active, payloads)
            for rail in active:
                if rail.error is None and iteration >= warmups:
                    times_s[rail.name].append(elapsed_s[rail.name])
                rail.sum_correct = rail.sum_correct and payloads[rail.name].is_sum(2)
    return times_s


def _run(world: World, rails: Sequence[Rail], payloads: Mapping[str, Payload]) -> dict[str, float]:
    """Seconds that each rail took from the common start. A rail that broke keeps the error and is left out after."""
    synchronize(world)
    elapsed_s: dict[str, float] = {}
    start_s = time.perf_counter()
    works = {rail.name: rail.group.allreduce([payloads[rail.name].tensor]) for rail in rails}
    while len(elapsed_s) < len(rails):
        for rail in rails:
            # With one rail there is nothing to look around for: waiting for it is more exact.
            if rail.name in elapsed_s or (len(rails) > 1 and not works[rail.name].is_completed()):
                continue
            try:
                works[rail.name].wait()
                synchronize(world)
            except RuntimeError as e:
                rail.error = f"{socket.gethostname()}: {str(e).splitlines()[0]}"
            elapsed_s[rail.name] = time.perf_counter() - start_s
        if len(elapsed_s) < len(rails):
            time.sleep(_POLL_S)
    return elapsed_s


def _gather(world: World, rails: Sequence[Rail], times_s: Mapping[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Per rail what both of its ends found, the same on every rank."""
    ends = gather_over_ranks(
        world,
        {rail.name: (times_s[rail.name], rail.sum_correct, rail.error) for rail in rails if rail.name in times_s},
    )
    found: dict[str, dict[str, Any]] = {}
    for name in times_s:
        both = [end[name] for end in ends]
        errors = [error for _, _, error in both if error]
        # Ranks that are no end of this rail measured nothing.
        times = [end_times for end_times, _, _ in both if end_times]
        found[name] = {
            "times_s": [] if errors else slowest(times),
            "sum_correct": all(correct for _, correct, _ in both),
            "error": errors[0] if errors else None,
        }
    return found
