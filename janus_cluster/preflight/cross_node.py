"""Nodes against each other: do they agree, do they reach each other on the master port, do their clocks agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from janus_cluster.preflight.interfaces import find_rails, judge_links
from janus_cluster.preflight.model import Check, CheckResult, State

# Judged by their own family already; so is a path that one node does not have.
_JUDGED_ELSEWHERE = frozenset({"versions"})
_SHOWN = 3


def judge_cross_node(facts_by_node: Mapping[str, dict[str, Any] | None]) -> list[CheckResult]:
    """What the facts of all nodes say together. Nothing for a single node, or where a node did not report."""
    present = {node: facts for node, facts in facts_by_node.items() if facts is not None}
    if len(present) < 2 or len(present) < len(facts_by_node):
        return []
    rails = find_rails({node: facts.get("interfaces", []) for node, facts in present.items()})
    tables = {node: facts.get("agreement", {}) for node, facts in present.items()}
    # With GPUs the pairs of GPUs are the rails; the one interface that matters is judged as net.interface.
    carry_the_data = not any("gpu" in facts for facts in present.values())
    return [*judge_agreement(tables), *judge_links(rails, list(present), carry_the_data=carry_the_data)]


def judge_agreement(tables: Mapping[str, Mapping[str, Mapping[str, Any] | None]]) -> list[CheckResult]:
    """One result per group: who differs from the first node, in what. ERROR where a node gave no answer (None).

    Which of two that differ is right cannot be known: the result is of all nodes, and excludes none. Files that differ
    in their time of change only are a WARN: a copy is as good as the original.
    """
    nodes = list(tables)
    groups = sorted({group for table in tables.values() for group in table} - _JUDGED_ELSEWHERE)
    results = []
    for group in groups:
        check = Check(
            id=f"same.{group}",
            node=",".join(nodes),
            expected=f"the same on {' and '.join(nodes)}",
            source="agreement of nodes",
            phase="cross_node",
        )
        silent = [node for node in nodes if tables[node].get(group, {}) is None]
        if silent:
            told = f"nothing to compare: {' and '.join(silent)} gave no answer"
            results.append(check.judged("ERROR", told, fix=f"see the other faults of {' and '.join(silent)}"))
            continue
        reference = tables[nodes[0]].get(group) or {}
        differing, harmless = _differences({node: tables[node].get(group) or {} for node in nodes}, group)
        if not differing and not any(value is not None for value in reference.values()):
            continue
        more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        state: State = "PASS" if not differing else ("WARN" if harmless else "FAIL")
        measured = "; ".join(differing[:_SHOWN]) + more if differing else f"{len(reference)} values"
        results.append(check.judged(state, measured, fix=_AGREEMENT_FIXES.get(group, "make the nodes alike")))
    return results


def _differences(of_nodes: Mapping[str, Mapping[str, Any]], group: str) -> tuple[list[str], bool]:
    """What differs from the first node, in words; and whether it is nothing but times of change."""
    (first, reference), *others = of_nodes.items()
    differing: list[str] = []
    harmless = True
    for node, theirs in others:
        for key in sorted({*reference, *theirs}):
            is_elsewhere = group == "files" and None in (reference.get(key), theirs.get(key))
            if reference.get(key) != theirs.get(key) and not is_elsewhere:
                differing.append(f"{key}: {first} {_told(reference.get(key))}, {node} {_told(theirs.get(key))}")
                harmless = harmless and key.endswith(".mtime")
    return differing, harmless


_AGREEMENT_FIXES = {
    "driver": "install one driver on all nodes",
    "gpus": "compare nvidia-smi -L on both nodes; drain the one that lost a GPU",
    "hcas": "compare ibstat on both nodes; one rail's cable, rate or firmware differs",
    "files": "copy the folder again, or mount the same file system on all nodes",
}


def _told(value: Any) -> str:
    return "nothing" if value is None else str(value)


def judge_connections(
    reports: Mapping[str, dict[str, Any] | None], *, address: str, port: int, clock_warn_s: float
) -> list[CheckResult]:
    """The master port answered from every node, and every node answered back; clocks are close.

    A connection has two ends: a failed one is of the pair, and excludes no node.
    """
    nodes = list(reports)
    results = []
    for node in nodes[1:]:
        pair = f"{nodes[0]},{node}"
        check = Check(
            id="master_port",
            node=pair,
            expected=f"{node} connects to {nodes[0]} on {address}:{port}, and back",
            source="TCP, both ways, with real listeners",
            phase="cross_node",
        )
        problem = _connection_problem(reports[nodes[0]], reports[node], node, f"{address}:{port}")
        fix = f"from {node}: nc -vz {address} {port}; firewall, or does {address} mean another interface there?"
        results.append(check.judged("FAIL" if problem else "PASS", problem or "both ways", fix=fix))
    offsets = {n: r["clock_offset_s"] for n, r in reports.items() if r and r.get("clock_offset_s") is not None}
    return [*results, *judge_clocks(offsets, nodes, warn_above_s=clock_warn_s)]


def _connection_problem(
    master: dict[str, Any] | None, own: dict[str, Any] | None, node: str, endpoint: str
) -> str | None:
    if own is None or master is None:
        return f"{node if own is None else 'the master'} did not report on {endpoint}"
    if master.get("error"):
        return f"listening on {endpoint}: {master['error']}"
    if own.get("error"):
        return f"{node} to {endpoint}: {own['error']}"
    heard = next((p for p in master.get("peers", []) if p["node"] == node), None)
    if heard is None:
        return f"{node} connected to {endpoint}, but another program answered there"
    return f"back to {node} at {heard['back']}: {heard['error']}" if heard["error"] else None


def judge_clocks(offsets_s: Mapping[str, float], nodes: Sequence[str], *, warn_above_s: float) -> list[CheckResult]:
    """WARN where the clocks of two nodes are further apart than `warn_above_s`. Offsets are against the first node."""
    if not offsets_s:
        return []
    all_offsets = {nodes[0]: 0.0} | dict(offsets_s)
    spread = max(all_offsets.values()) - min(all_offsets.values())
    check = Check(
        id="clock",
        node=",".join(nodes),
        expected=f"<= {warn_above_s:g} s apart",
        source="templates/preflight",
        unit="s",
        phase="cross_node",
    )
    told = f"{spread:.3g} s apart" + "".join(f"; {n} {o:+.3g} s" for n, o in offsets_s.items())
    return [
        check.judged("WARN" if spread > warn_above_s else "PASS", told, fix="timedatectl; is chrony or ntp running?")
    ]


def describe_loopback(reports: Mapping[str, dict[str, Any] | None]) -> str:
    """What each host does over its own loopback: a slow host shows here, a slow cable does not."""
    rates = {node: r["loopback_gb_per_s"] for node, r in reports.items() if r and r.get("loopback_gb_per_s")}
    if not rates:
        return ""
    return "loopback within the hosts: " + ", ".join(f"{node} {rate:.2g} GB/s" for node, rate in rates.items())
