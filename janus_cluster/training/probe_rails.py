"""Pairs of nodes over one rail each, in rounds of disjoint pairs: one rail after the other, then all rails at once.

On GPUs a rail is GPU k of two nodes, and NCCL takes the HCA beside it. Over gloo a rail is a network interface: the
first rank of each node owns one process group per interface and partner, bound to it, within one process.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from janus_cluster.run.records.rails import Pair, PairPlan, RailTest, best_rates, median_of_others, without_doubles
from janus_cluster.training.probe_timing import Payload, local_world_size, slowest, synchronize
from janus_cluster.training.world import World, gather

# A rail that carries nothing shall not eat the time of the whole gate.
_RAIL_TIMEOUT_S = 10.0
_POLL_S = 0.0002


@dataclass(frozen=True)
class _Slot:
    """One pair on one rail of this round."""

    rail: str
    pair: Pair


@dataclass
class _Link:
    """This rank's end of a pair on a rail. `group` is None where it could not be made."""

    group: Any = None
    error: str | None = None
    sum_correct: bool = True
    times_s: list[float] = field(default_factory=list)


def measure_rails(
    world: World,
    rails: Sequence[Mapping[str, str]],
    settings: Mapping[str, Any],
    *,
    node: str,
    baseline: Mapping[str, float] | None = None,
) -> list[RailTest]:
    """The tests in which this node took part: each rail alone, again where it was slow, and all rails at once.

    `baseline`: test → the least rate that this site accepts for it.
    """
    links = _Links(world, rails, node=node, payload_bytes=round(float(settings["payload_mb"]) * 1e6))
    names, repeats = [rail["name"] for rail in rails], int(settings["repeats"])
    rounds = {"warmups": int(settings["warmups"]), "iterations": int(settings["iterations"])}
    alone: list[RailTest] = []
    plans = {name: PairPlan(links.nodes, repeats=repeats) for name in names}
    while any(slots := [[_Slot(name, pair) for pair in plans[name].next_round()] for name in names]):
        found = links.measure(slots, together=False, **rounds)
        alone += found
        slow = find_slow(found, alone, settings, baseline or {})
        for test in found:
            plans[test.rail].note(test.pair, is_slow=test in slow, is_broken=test.is_broken)
    together: list[RailTest] = []
    plan, works = PairPlan(links.nodes, repeats=repeats), best_rates(alone, statistic="best")
    while pairs := plan.next_round():
        # An end that carried nothing would only make the others wait for it.
        usable = [_Slot(n, pair) for pair in pairs for n in names if all(works.get((end, n)) for end in pair)]
        found = links.measure([usable], together=True, **rounds)
        together += found
        slow = find_slow(found, together, settings, baseline or {})
        for pair in pairs:
            own = [test for test in found if test.pair == pair]
            plan.note(pair, is_slow=any(t in slow for t in own), is_broken=any(t.is_broken for t in own))
    return [test for test in (*alone, *together) if node in test.nodes]


def find_slow(
    found: Sequence[RailTest], every: Iterable[RailTest], settings: Mapping[str, Any], baseline: Mapping[str, float]
) -> list[RailTest]:
    """Of `found` those below the profile's floor, the site's, or the profile's share of the other ends' median."""
    statistic = str(settings.get("statistic", "median"))
    best = best_rates(every, statistic=statistic)
    slow = []
    for test in found:
        floor, share = ("together_gb_per_s", "of_median_together") if test.together else ("busbw_gb_per_s", "of_median")
        name = f"{'rails_together' if test.together else 'rail'}.{test.rail}"
        limits = [float((settings.get(floor) or {}).get("fail_below", 0)), baseline.get(name, 0.0)]
        if (row := settings.get(share)) and (median := median_of_others(test, best)) is not None:
            limits.append(float(row["fail_below"]) * median)
        if test.is_broken or test.rate_gb_per_s(statistic) < max(limits):
            slow.append(test)
    return slow


class _Links:
    """The process groups of this rank, one per partner and rail, made when a pair is first tested."""

    def __init__(self, world: World, rails: Sequence[Mapping[str, str]], *, node: str, payload_bytes: int) -> None:
        self.world = world
        self.node = node
        size = local_world_size()
        self.nodes: list[str] = gather(node)[::size]
        self._interfaces = {rail["name"]: rail["interface"] for rail in rails}
        self._is_bound = any(self._interfaces.values())
        if self._is_bound:
            own = list(self._interfaces) if world.is_node_main else []
        else:
            own = [rail["name"] for k, rail in enumerate(rails) if k == world.local_rank]
        # By interface all rails are the first rank's, by GPU each rank has its own.
        self._payloads = {name: Payload(payload_bytes, world.device) for name in own}
        self._payload_bytes = payload_bytes
        self._groups: dict[_Slot, Any] = {}
        self._round = 0

    def measure(
        self, sets: Sequence[Sequence[_Slot]], *, together: bool, warmups: int, iterations: int
    ) -> list[RailTest]:
        """Every pair's test, the same on every rank. The slots of one set run at once, one set after the other.

        In rounds over the sets, so that a burst of other work on the host hits all of them alike.
        """
        self._round += 1
        links = {slot: self._open(slot) for slots in sets for slot in slots if self._is_end(slot)}
        for iteration in range(warmups + iterations):
            for slots in sets:
                if not slots:
                    continue
                active = {s: links[s] for s in slots if s in links and links[s].error is None}
                for slot in active:
                    self._payloads[slot.rail].fill(slot.pair.index(self.node))
                dist.barrier()
                elapsed_s = self._run(active)
                for slot, link in active.items():
                    if link.error is None and iteration >= warmups:
                        link.times_s.append(elapsed_s[slot])
                    link.sum_correct = link.sum_correct and self._payloads[slot.rail].is_sum(2)
        tests = self._gather(links, together=together)
        for test in tests:
            if test.error is not None:
                # At both ends: what is left in its connections would be taken for the next sum.
                self._groups.pop(_Slot(test.rail, test.pair), None)
        return tests

    def _is_end(self, slot: _Slot) -> bool:
        return slot.rail in self._payloads and self.node in slot.pair

    def _open(self, slot: _Slot) -> _Link:
        """This rank's link to its partner. Both ends come here in the same round; no other rank has to."""
        if slot not in self._groups:
            try:
                self._groups[slot] = self._make_group(slot)
            except RuntimeError as e:
                return _Link(error=f"{socket.gethostname()}: {str(e).splitlines()[0]}")
        return _Link(group=self._groups[slot])

    def _make_group(self, slot: _Slot) -> Any:
        """A group of two, over gloo bound to the interface as this node calls it.

        Made directly and not by new_group, which all ranks of the job would have to call for every pair.
        """
        name = f"rail/{self._round}/{slot.rail}/{'/'.join(slot.pair)}"
        store, place = PrefixStore(name, _get_default_store()), slot.pair.index(self.node)
        if self.world.device.type == "cuda":
            return dist.ProcessGroupNCCL(store, place, 2, dist.ProcessGroupNCCL.Options())
        gloo = dist.ProcessGroupGloo
        options = gloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=_RAIL_TIMEOUT_S)
        interface = self._interfaces[slot.rail]
        options._devices = [gloo.create_device(interface=interface) if interface else gloo.create_default_device()]
        return gloo(store, place, 2, options)

    def _run(self, active: Mapping[_Slot, _Link]) -> dict[_Slot, float]:
        """Seconds that each link took from the common start. One that broke keeps the error and is left out after."""
        synchronize(self.world)
        elapsed_s: dict[_Slot, float] = {}
        start_s = time.perf_counter()
        works = {slot: link.group.allreduce([self._payloads[slot.rail].tensor]) for slot, link in active.items()}
        while len(elapsed_s) < len(active):
            for slot, link in active.items():
                # With one link there is nothing to look around for: waiting for it is more exact.
                if slot in elapsed_s or (len(active) > 1 and not works[slot].is_completed()):
                    continue
                try:
                    works[slot].wait()
                    synchronize(self.world)
                except RuntimeError as e:
                    link.error = f"{socket.gethostname()}: {str(e).splitlines()[0]}"
                elapsed_s[slot] = time.perf_counter() - start_s
            if len(elapsed_s) < len(active):
                time.sleep(_POLL_S)
        return elapsed_s

    def _gather(self, links: Mapping[_Slot, _Link], *, together: bool) -> list[RailTest]:
        """Every pair's test as its two ends found it."""
        own = [(s.rail, s.pair, link.times_s, link.sum_correct, link.error) for s, link in links.items()]
        ends: dict[tuple[str, Pair], list[Any]] = {}
        for rail, pair, *found in (end for of_rank in gather(own) for end in of_rank):
            ends.setdefault((rail, pair), []).append(found)
        tests = []
        for (rail, pair), both in ends.items():
            error = next((error for _, _, error in both if error), None)
            times_s = [] if error else slowest([end_times for end_times, _, _ in both])
            tests.append(
                RailTest(
                    rail=rail,
                    nodes=pair,
                    together=together,
                    payload_bytes=self._payload_bytes,
                    times_s=tuple(times_s),
                    sum_correct=all(correct for _, correct, _ in both),
                    error=error,
                )
            )
        return without_doubles(tests)
