"""verdict.json and verdict.<node>.json: what every check of the gate found, and how the worst of many wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from janus_cluster.run.hosts import fold_nodes
from janus_cluster.run.records.base import Record

State = Literal["PASS", "WARN", "FAIL", "SKIP", "ERROR"]
Phase = Literal["static", "cross_node", "active"]

# FAIL outranks ERROR: a measured fault proves more than a check that could not run.
_RANK: dict[str, int] = {"SKIP": 0, "PASS": 1, "WARN": 2, "ERROR": 3, "FAIL": 4}

# What is to be fixed, or at least looked at.
FAULTS = ("FAIL", "ERROR", "WARN")

# `janus-cluster preflight` ends with these; a gate that only skipped has proven nothing.
EXIT_CODES: dict[str, int] = {"PASS": 0, "WARN": 1, "FAIL": 2, "ERROR": 3, "SKIP": 3}


# A failure of these on one node does not prove that this node is to blame.
UNATTRIBUTED = frozenset({"all_reduce"})
# Checks of what the job asks for; a failure on every node blames the job.
JOB_WIDE = ("paths.", "versions")


@dataclass(frozen=True, kw_only=True)
class CheckResult(Record):
    """One judged check on one node. `fix` is the line on how to fix it.

    `blames_node`: whether a FAIL is this node's own; what a whole site or the job's environment has excludes no node.
    """

    SCHEMA_VERSION: ClassVar[int | None] = None

    id: str
    phase: Phase
    node: str
    state: State
    measured: str
    expected: str
    unit: str = ""
    threshold_source: str = ""
    fix: str = ""
    duration_s: float = 0.0
    blames_node: bool = True


def worst(states: Sequence[State]) -> State:
    """The worst state: FAIL, ERROR, WARN, PASS, SKIP. Nothing at all is ERROR, never PASS."""
    if not states:
        return "ERROR"
    return max(states, key=lambda s: _RANK[s])


def join_few(parts: Sequence[str], *, most: int = 3) -> str:
    """The first few, and how many more there are."""
    more = [f"and {len(parts) - most} more"] if len(parts) > most else []
    return "; ".join([*parts[:most], *more])


def group_nodes(results: Sequence[CheckResult]) -> list[tuple[CheckResult, list[str]]]:
    """Results that differ in nothing a reader sees but the node, as one result with its nodes."""
    groups: dict[tuple[str, ...], tuple[CheckResult, list[str]]] = {}
    for r in results:
        key = (r.state, r.id, r.measured, r.expected)
        groups.setdefault(key, (r, []))[1].append(r.node)
    return list(groups.values())


@dataclass(frozen=True, kw_only=True)
class Verdict(Record):
    """The gate's verdict on one attempt. Training trusts it only for this job id, node list and configuration."""

    state: State
    job_id: str | None
    config_hash: str
    nodes: tuple[str, ...]
    created_at: float
    results: tuple[CheckResult, ...]

    @property
    def exclude(self) -> tuple[str, ...]:
        """Nodes that a failed check blames, for `--exclude=`; a pair or a failed collective names no culprit."""
        failed = [r for r in self.results if r.state == "FAIL" and r.blames_node and r.id not in UNATTRIBUTED]
        blamed = {r.id: {x.node for x in failed if x.id == r.id} for r in failed}
        # A path or package that no node has is the job's fault: other nodes would not have it either.
        shared = {i for i, n in blamed.items() if i.startswith(JOB_WIDE) and len(self.nodes) > 1 and n >= {*self.nodes}}
        bad = {r.node for r in failed if r.id not in shared}
        return tuple(n for n in self.nodes if n in bad)

    def of_node(self, node: str) -> Verdict:
        """The same verdict, reduced to the results of one node."""
        mine = tuple(r for r in self.results if r.node == node)
        return Verdict(
            state=worst([r.state for r in mine]),
            job_id=self.job_id,
            config_hash=self.config_hash,
            nodes=(node,),
            created_at=self.created_at,
            results=mine,
        )

    def worst_first(self) -> list[CheckResult]:
        """Results, the worst on top; equal ones in the order of the checks."""
        return sorted(self.results, key=lambda r: -_RANK[r.state])

    def summary(self) -> str:
        """One line: `preflight FAIL: h800-02 paths.model (missing)`."""
        faults = group_nodes([r for r in self.worst_first() if r.state in FAULTS])
        if not faults:
            return f"preflight {self.state}"
        measured = join_few([f"{fold_nodes(nodes)} {r.id} ({r.measured})" for r, nodes in faults])
        return f"preflight {self.state}: {measured}"

    def to_json(self) -> dict[str, Any]:
        """The JSON of verdict.json: `exclude` is in it for readers without this program."""
        return super().to_json() | {"exclude": list(self.exclude)}

    def to_report(self) -> dict[str, Any]:
        """The JSON that `janus-cluster preflight --json` prints: by node what is of one node, the rest apart."""
        by_node: dict[str, list[dict[str, Any]]] = {node: [] for node in self.nodes}
        cross: list[dict[str, Any]] = []
        for r in self.worst_first():
            apart = r.phase == "cross_node" or r.node not in by_node
            (cross if apart else by_node[r.node]).append(r.to_json())
        return {
            "verdict": self.state,
            "exit_code": EXIT_CODES[self.state],
            "nodes": by_node,
            "cross_node": cross,
            "exclude": list(self.exclude),
        }
