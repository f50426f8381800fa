"""Judge the all-reduce over all ranks: right sum, every rank present, bus bandwidth above the floor."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from janus_cluster.job.ring import ring_bus_gb_per_s
from janus_cluster.preflight.rate import Limit, judge_rate
from janus_cluster.run.records.verdict import CheckResult


@dataclass(frozen=True, kw_only=True)
class ProbeError:
    """Why a node's probe did not report. `advice`: what to type on the node, where the cause is known."""

    message: str
    advice: str | None = None


def busbw_gb_per_s(times_s: Sequence[float], *, payload_bytes: int, world_size: int) -> float:
    """Bus bandwidth of an all-reduce from the median time.

    Units:   payload_bytes / median(times_s) · 2(n-1)/n; 1 GB = 1e9 B. One rank moves nothing: algbw is given.
    Raises:  ValueError if times_s is empty or holds a time that is not positive.
    Source:  NVIDIA/nccl-tests doc/PERFORMANCE.md, AllReduce.
    """
    if not times_s or min(times_s) <= 0:
        raise ValueError("times_s must hold positive times")
    algbw = payload_bytes / statistics.median(times_s) / 1e9
    return algbw * (2 * (world_size - 1) / world_size if world_size > 1 else 1.0)


def floor_of(row: Mapping[str, Any], *, nodes: int, gpus_per_node: int, payload_bytes: int) -> Limit:
    """The least bus bandwidth on so many nodes, from the profile's rows for one node and for two."""
    of_two = row["two_nodes"]
    if nodes <= 2:
        found = row["one_node"] if nodes == 1 else of_two
        return Limit(float(found["fail_below"]), "FAIL", str(found["source"]))
    value = ring_bus_gb_per_s(
        float(of_two["fail_below"]), nodes=nodes, gpus_per_node=gpus_per_node, payload_bytes=payload_bytes
    )
    source = f"{of_two['fail_below']:g} on two nodes ({of_two['source']}), less the steps of a ring over {nodes}"
    return Limit(value, "FAIL", source)


def judge_all_reduce(
    facts: dict[str, Any] | None,
    *,
    node: str,
    world_size: int,
    floor: Limit,
    more_limits: Sequence[Limit] = (),
    error: ProbeError | None = None,
) -> CheckResult:
    """Compare one node's measured all-reduce with the profile's floor.

    `error`: why the node did not report, where its logs show that.
    Returns: PASS, or FAIL when the node did not report, the sum was wrong, a rank was missing or the bandwidth
             is below the floor.
    """
    result = partial(
        CheckResult,
        id="all_reduce",
        phase="active",
        node=node,
        unit="GB/s",
        expected=f">= {floor.value:.3g} GB/s busbw",
        threshold_source=floor.source,
    )
    fix = "see the node logs of this attempt; which interface does NCCL/gloo use, can the nodes reach each other?"
    if facts is None:
        if error is None:
            return result(state="FAIL", measured="did not report", fix=fix)
        return result(state="FAIL", measured=f"did not report: {error.message}", fix=error.advice or fix)
    if not facts["sum_correct"]:
        return result(state="FAIL", measured="the sum was wrong", fix="a GPU or link corrupts data: " + fix)
    if facts["world_size"] != world_size:
        return result(state="FAIL", measured=f"{facts['world_size']} of {world_size} ranks", fix=fix)
    busbw = busbw_gb_per_s(facts["times_s"], payload_bytes=facts["payload_bytes"], world_size=world_size)
    payload = f"{facts['payload_bytes'] / 1e6:g} MB, {facts['backend']}, {world_size} ranks"
    limits = [floor, *more_limits]
    return judge_rate(busbw, limits, id="all_reduce", node=node, unit="GB/s", what="busbw", detail=payload, fix=fix)
