"""Nodes against each other: do they agree, do they reach each other on the master port, do their clocks agree."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from janus_cluster.preflight.agreement import find_reference
from janus_cluster.preflight.interfaces import find_rails, judge_links
from janus_cluster.preflight.model import Check
from janus_cluster.run.hosts import join_endpoint
from janus_cluster.run.records.rails import attribute_ends
from janus_cluster.run.records.verdict import CheckResult, State, join_few

# Judged by their own family already; so is a path that one node does not have.
_JUDGED_ELSEWHERE = frozenset({"versions"})


def judge_cross_node(facts_by_node: Mapping[str, dict[str, Any] | None]) -> list[CheckResult]:
    """Compare the facts of all nodes. Nothing for a single node, or where a node did not report."""
    present = {node: facts for node, facts in facts_by_node.items() if facts is not None}
    if len(present) < 2 or len(present) < len(facts_by_node):
        return []
    rails = find_rails({node: facts.get("interfaces", []) for node, facts in present.items()})
    tables = {node: facts.get("agreement", {}) for node, facts in present.items()}
    # With GPUs the pairs of GPUs are the rails; the one interface that matters is judged as net.interface.
    carry_the_data = not any("gpu" in facts for facts in present.values())
    return [*judge_agreement(tables), *judge_links(rails, list(present), carry_the_data=carry_the_data)]


def judge_agreement(tables: Mapping[str, Mapping[str, Mapping[str, Any] | None]]) -> list[CheckResult]:
    """Results per group: who differs, in what. SKIP where a node gave no answer (None).

    Of three or more the odd one is who differs from the most. Otherwise none is known to be right: the result is of
    all nodes, and excludes none. Files that differ in their time of change only are a WARN: a copy is as good as the
    original. So are HCAs of another firmware.
    """
    nodes = list(tables)
    groups = sorted({group for table in tables.values() for group in table} - _JUDGED_ELSEWHERE)
    results = []
    for group in groups:
        check = Check(
            id=f"same.{group}",
            node=",".join(nodes),
            expected=f"the same on {' and '.join(nodes) if len(nodes) <= 3 else f'all {len(nodes)} nodes'}",
            source="agreement of nodes",
            phase="cross_node",
        )
        silent = [node for node in nodes if tables[node].get(group, {}) is None]
        if silent:
            # Its own check has failed already: one cause is one line.
            measured = f"nothing to compare: {' and '.join(silent)} gave no answer (gpu.count)"
            results.append(check.judged("SKIP", measured))
            continue
        of_nodes = {node: tables[node].get(group) or {} for node in nodes}
        first, is_majority = find_reference(of_nodes)
        differing, harmless = _differences(of_nodes, group, first=first)
        if not differing and not any(value is not None for value in of_nodes[first].values()):
            continue
        fix = _AGREEMENT_FIXES.get(group, "make the nodes alike")
        if is_majority and differing and not harmless:
            results += _judge_odd_ones(check, of_nodes, group, first=first, fix=fix)
            continue
        state: State = "PASS" if not differing else ("WARN" if harmless else "FAIL")
        results.append(check.judged(state, join_few(differing) or f"{len(of_nodes[first])} values", fix=fix))
    return results


def _judge_odd_ones(
    check: Check, of_nodes: Mapping[str, Mapping[str, Any]], group: str, *, first: str, fix: str
) -> list[CheckResult]:
    """FAIL for each node that differs from the most in more than times of change."""
    results = []
    for node, own in of_nodes.items():
        differing, harmless = _differences({first: of_nodes[first], node: own}, group, first=first)
        if differing and not harmless:
            alone = replace(check, node=node, expected=f"as on {first} and most of the others")
            results.append(alone.judged("FAIL", join_few(differing), fix=fix))
    return results


def _differences(of_nodes: Mapping[str, Mapping[str, Any]], group: str, *, first: str) -> tuple[list[str], bool]:
    """(what differs from node `first`; whether it does no harm)."""
    reference = of_nodes[first]
    differing: list[str] = []
    harmless = True
    for node, theirs in of_nodes.items():
        if node == first:
            continue
        for key in sorted({*reference, *theirs}):
            is_elsewhere = group == "files" and None in (reference.get(key), theirs.get(key))
            if reference.get(key) != theirs.get(key) and not is_elsewhere:
                differing.append(f"{key}: {first} {_shown(reference.get(key))}, {node} {_shown(theirs.get(key))}")
                harmless = harmless and (key.endswith(".mtime") or key in _HARMLESS.get(group, ()))
    return differing, harmless


_HARMLESS = {"hcas": ("firmware",)}
_AGREEMENT_FIXES = {
    "driver": "install one driver on all nodes",
    "gpus": "compare nvidia-smi -L on the nodes; drain the one that lost a GPU",
    "hcas": "compare ibstat on the nodes; the number, rate, PCIe link or firmware of their rails differs",
    "files": "copy the folder again, or mount the same file system on all nodes",
}


def _shown(value: Any) -> str:
    return "nothing" if value is None else str(value)


def judge_connections(
    reports: Mapping[str, dict[str, Any] | None], *, address: str, port: int, clock_warn_s: float
) -> list[CheckResult]:
    """The master port is reachable from every node, every node is reachable from it, and clocks are close.

    A connection has two ends: a failed one is of the pair, and excludes no node. Where node 0 was reached by others it
    is of the other end.
    """
    nodes = list(reports)
    endpoint = join_endpoint(address, port)
    problems = {node: _connection_problem(reports[nodes[0]], reports[node], node, endpoint) for node in nodes[1:]}
    pairs = {node: (nodes[0], node) for node in problems}
    ends = attribute_ends(
        (pairs[n] for n, problem in problems.items() if problem), (pairs[n] for n, p in problems.items() if not p)
    )
    results = []
    for node, problem in problems.items():
        pair = node if node in ends.bad else f"{nodes[0]},{node}"
        check = Check(
            id="master_port",
            node=pair,
            expected=f"{node} connects to {nodes[0]} on {endpoint}, and back",
            source="TCP, both ways, with real listeners",
            phase="cross_node",
        )
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
    accepted = next((p for p in master.get("peers", []) if p["node"] == node), None)
    if accepted is None:
        return f"{node} connected to {endpoint}, but another program answered there"
    return f"back to {node} at {accepted['back']}: {accepted['error']}" if accepted["error"] else None


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
    furthest = join_few([f"{node} {offsets_s[node]:+.3g} s" for node in _furthest_first(all_offsets)])
    measured = f"{spread:.3g} s apart; {furthest}"
    return [
        check.judged(
            "WARN" if spread > warn_above_s else "PASS", measured, fix="timedatectl; is chrony or ntp running?"
        )
    ]


def _furthest_first(offsets_s: Mapping[str, float]) -> list[str]:
    """The nodes but the first, whose clock is the measure, that which is furthest from the median on top."""
    middle = statistics.median(offsets_s.values())
    return sorted(list(offsets_s)[1:], key=lambda node: -abs(offsets_s[node] - middle))


def describe_loopback(reports: Mapping[str, dict[str, Any] | None]) -> str:
    """What each host does over its own loopback: a slow host shows here, a slow cable does not."""
    rates = {node: r["loopback_gb_per_s"] for node, r in reports.items() if r and r.get("loopback_gb_per_s")}
    if not rates:
        return ""
    return "loopback within the hosts: " + ", ".join(f"{node} {rate:.2g} GB/s" for node, rate in rates.items())
