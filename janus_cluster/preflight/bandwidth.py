"""Judge the probe's measurements: each GPU's GEMM, each node's all-reduce, each link's error counters."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from janus_cluster.preflight.all_reduce import busbw_gb_per_s
from janus_cluster.preflight.model import Check
from janus_cluster.preflight.rate import Limit, baseline_limits, judge_rate, profile_limits
from janus_cluster.run.records.verdict import CheckResult

# Per node: interface or HCA → by how much each of its error counters rose during the probe.
CounterDeltas = Mapping[str, Mapping[str, Mapping[str, int]]]


def judge_gemm(facts: Mapping[str, Any], profile: Mapping[str, Any], *, node: str) -> CheckResult:
    """The slowest device of the node against the floor and against the median of the node's devices."""
    row, ranks = profile["gemm"], facts["gemm"]
    rates = [float(r["tflops"]) for r in ranks]
    slowest = min(ranks, key=lambda r: float(r["tflops"]))
    wrong = [r["local_rank"] for r in ranks if not r["consistent"]]
    fix = f"on {node}: nvidia-smi -q -d PERFORMANCE,TEMPERATURE,ECC -i {slowest['local_rank']}"
    if wrong:
        check = Check(id="gemm", node=node, expected="the same product each time", source="bitwise", phase="active")
        measured = f"device {', '.join(map(str, wrong))}: the same product gave different results"
        return check.judged("FAIL", measured, fix=f"drain {node}: a GPU computes wrongly")
    limits = profile_limits(row["tflops"]) + baseline_limits(profile, "gemm")
    if row.get("of_median") and len(rates) > 1:
        share = row["of_median"]
        limits.append(Limit(share["fail_below"] * statistics.median(rates), "FAIL", share["source"]))
    detail = f"slowest of {len(rates)}, device {slowest['local_rank']}; {row['dtype']}, n = {row['size']}"
    return judge_rate(min(rates), limits, id="gemm", node=node, unit="TFLOP/s", detail=detail, fix=fix)


def judge_intra_node(facts: Mapping[str, Any], profile: Mapping[str, Any], *, node: str) -> CheckResult:
    """The all-reduce within the node against the floor; SKIP where the node has one rank."""
    part = facts["intra_node"]
    check = Check(id="intra_node", node=node, expected="right sums", source="exact in fp32", phase="active")
    if part is None:
        return check.judged("SKIP", "one rank per node")
    fix = f"on {node}: nvidia-smi nvlink -s; nvidia-smi topo -m"
    if not part["sum_correct"]:
        return check.judged("FAIL", "the sum was wrong", fix=f"a GPU or a link of {node} corrupts data: {fix}")
    busbw = busbw_gb_per_s(part["times_s"], payload_bytes=part["payload_bytes"], world_size=part["num_ranks"])
    limits = profile_limits(profile["intra_node"]["busbw_gb_per_s"]) + baseline_limits(profile, "intra_node")
    detail = f"{part['num_ranks']} ranks, {part['payload_bytes'] / 1e6:g} MB"
    return judge_rate(busbw, limits, id="intra_node", node=node, unit="GB/s", what="busbw", detail=detail, fix=fix)


def judge_counters(deltas: Mapping[str, Mapping[str, int]] | None, *, node: str, is_wanted: bool) -> CheckResult:
    """WARN for a link whose error counters rose during our own stress test; ERROR where they were not read."""
    check = Check(
        id="link_errors",
        node=node,
        expected="no error counter rises during the probe",
        source="sysfs, before and after",
        phase="active",
    )
    fix = f"on {node}: clean or swap the cable of that port, then repeat the preflight"
    if deltas is None:
        return check.judged("ERROR", "the counters were not read", fix=f"see the log of {node}")
    if not deltas:
        return check.judged("ERROR" if is_wanted else "SKIP", "no port with counters", fix=f"on {node}: ibstat")
    risen = [f"{port} {name} +{by}" for port, counters in deltas.items() for name, by in counters.items() if by > 0]
    return check.judged("WARN" if risen else "PASS", "; ".join(risen[:4]) or f"{len(deltas)} links", fix=fix)


def counter_deltas(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """By how much each counter rose; a port or counter that was not there before is left out, as is one set to 0."""
    return {
        port: {
            name: count - before[port][name]
            for name, count in counters.items()
            if count > before[port].get(name, count)
        }
        for port, counters in after.items()
        if port in before
    }
