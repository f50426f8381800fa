"""What the probe measured, judged: each GPU's GEMM, each node's all-reduce, each rail alone and all rails at once."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from janus_cluster.preflight.all_reduce import busbw_gb_per_s
from janus_cluster.preflight.model import Check, CheckResult
from janus_cluster.preflight.rate import Limit, baseline_limits, judge_rate, profile_limits

# Per node: interface or HCA → by how much each of its error counters rose during the probe.
CounterDeltas = Mapping[str, Mapping[str, Mapping[str, int]]]


def judge_gemm(facts: Mapping[str, Any], profile: Mapping[str, Any], *, node: str) -> CheckResult:
    """The slowest device of the node against the floor and against the median of its neighbours."""
    row, ranks = profile["gemm"], facts["gemm"]
    rates = [float(r["tflops"]) for r in ranks]
    slowest = min(ranks, key=lambda r: float(r["tflops"]))
    wrong = [r["local_rank"] for r in ranks if not r["consistent"]]
    fix = f"on {node}: nvidia-smi -q -d PERFORMANCE,TEMPERATURE,ECC -i {slowest['local_rank']}"
    if wrong:
        check = Check(id="gemm", node=node, expected="the same product each time", source="bitwise", phase="active")
        told = f"device {', '.join(map(str, wrong))}: the same product came out differently"
        return check.judged("FAIL", told, fix=f"drain {node}: a GPU computes wrongly")
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


def judge_rails(
    rails: Sequence[Mapping[str, Any]],
    profile: Mapping[str, Any],
    *,
    nodes: Sequence[str],
    deltas: CounterDeltas,
    evidence: str,
) -> list[CheckResult]:
    """Every rail alone and all at once, against the floor and against the median of the other rails.

    A slow rail is of the pair of nodes, unless the error counters rose at one end only: then it is of that node.
    `evidence` is what else is known of the hosts; it is told where nobody can be blamed.
    """
    row = profile["rails"]
    # A rail that was slow was measured again, until it was not or profile.rails.repeats were spent.
    statistic = row["statistic"]
    alone = {rail["name"]: rail_rate(rail, "times_s", "again_s", statistic=statistic) for rail in rails}
    together = {rail["name"]: rail_rate(rail, "together_s", statistic=statistic) for rail in rails}
    if not rails:
        why = "one node" if len(nodes) < 2 else "the nodes share no network (simulated nodes on one machine?)"
        check = Check(id="rails", node=",".join(nodes), expected="a pair per rail", source="probe", phase="active")
        return [check.judged("SKIP", f"no rail to test: {why}")]
    results = []
    for rail in rails:
        name = rail["name"]
        node, why = attribute(name, nodes, deltas, evidence)
        fix = f"{why}. Compare cable, port rate and PCIe width of {name} on {' and '.join(nodes)}; swap one end"
        if rail["error"] or not rail["sum_correct"]:
            check = Check(id=f"rail.{name}", node=node, expected="data comes over", source="probe", phase="active")
            results.append(check.judged("FAIL", rail["error"] or "the sum was wrong", fix=fix))
            continue
        for test, rates, floor, share in (
            (f"rail.{name}", alone, row["busbw_gb_per_s"], row.get("of_median")),
            (f"rails_together.{name}", together, row["together_gb_per_s"], row.get("of_median_together")),
        ):
            limits = [*profile_limits(floor), *baseline_limits(profile, test), *_median_limits(name, rates, share)]
            times = "repeated, " if rates is alone and rail["again_s"] else ""
            detail = f"{statistic}, {times}{rail['payload_bytes'] / 1e6:g} MB, {' and '.join(nodes)}"
            rate = rates[name] or 0.0
            results.append(judge_rate(rate, limits, id=test, node=node, unit="GB/s", detail=detail, fix=fix))
    return results


def rail_rate(rail: Mapping[str, Any], *passes: str, statistic: str) -> float | None:
    """GB/s of the better pass; None where the rail carried nothing. At two ranks busbw and algbw are the same.

    statistic: median over the iterations, or best, which is the fastest of them.
    """
    one_of = min if statistic == "best" else statistics.median
    times_s = [one_of(rail[key]) for key in passes if rail[key]]
    return rail["payload_bytes"] / min(times_s) / 1e9 if times_s else None


def _median_limits(name: str, rates: Mapping[str, float | None], share: Mapping[str, Any] | None) -> list[Limit]:
    others = [rate for other, rate in rates.items() if other != name and rate is not None]
    if not share or not others:
        return []
    median = statistics.median(others)
    source = f"{share['fail_below']:g} × the median of the other rails ({median:.3g}): {share['source']}"
    return [Limit(share["fail_below"] * median, "FAIL", source)]


def attribute(rail: str, nodes: Sequence[str], deltas: CounterDeltas, evidence: str) -> tuple[str, str]:
    """The node to blame for a slow rail, or all of them joined by commas; and the reason in words."""
    rose = {node: _count_errors(deltas.get(node, {}), rail) for node in nodes}
    guilty = [node for node, count in rose.items() if count > 0]
    told = ", ".join(f"{node} +{count}" for node, count in rose.items())
    if len(guilty) == 1:
        return guilty[0], f"error counters rose at one end only ({told})"
    more = f"; {evidence}" if evidence else ""
    return ",".join(nodes), f"which end is slow cannot be told: error counters {told}{more}"


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


def _count_errors(deltas: Mapping[str, Mapping[str, int]], rail: str) -> int:
    """Of the rail's own port; where the rail is a GPU and NCCL chose the port, of all HCA ports (mlx5_0:1).

    Without HCAs it is of all interfaces; beside HCAs these blame nobody: IPoIB drops packets on sound nodes.
    """
    of_hcas = [counters for port, counters in deltas.items() if ":" in port]
    ports = [deltas[rail]] if rail in deltas else of_hcas or list(deltas.values())
    return sum(sum(counters.values()) for counters in ports)
