"""What a check says, and how the worst of many wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["PASS", "WARN", "FAIL", "SKIP", "ERROR"]
Phase = Literal["static", "cross_node", "active"]

# FAIL outranks ERROR: a fault that was measured says more than one that could not be.
_RANK: dict[str, int] = {"SKIP": 0, "PASS": 1, "WARN": 2, "ERROR": 3, "FAIL": 4}

# What is to be mended, or at least looked at.
FAULTS = ("FAIL", "ERROR", "WARN")

# `janus-cluster preflight` ends with these; a gate that only skipped has proven nothing.
EXIT_CODES: dict[str, int] = {"PASS": 0, "WARN": 1, "FAIL": 2, "ERROR": 3, "SKIP": 3}


# A failure of these on one node does not say that this node is to blame.
UNATTRIBUTED = frozenset({"all_reduce"})
# Checks of what the job asks for; a failure on every node blames the job.
JOB_WIDE = ("paths.", "versions")


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """One judged check on one node. `fix` is the line that says how to mend it."""

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


@dataclass(frozen=True, kw_only=True)
class Check:
    """What is asked of one node, before the answer: `judged` makes the result."""

    id: str
    node: str
    expected: str
    source: str
    unit: str = ""
    phase: Phase = "static"

    def judged(self, state: State, measured: str, *, fix: str = "", duration_s: float = 0.0) -> CheckResult:
        """The result; a line on how to mend it stands only where something is to be mended."""
        return CheckResult(
            id=self.id,
            phase=self.phase,
            node=self.node,
            state=state,
            measured=measured,
            expected=self.expected,
            unit=self.unit,
            threshold_source=self.source,
            fix="" if state in ("PASS", "SKIP") else fix,
            duration_s=duration_s,
        )


def worst(states: Sequence[State]) -> State:
    """The state that wins: FAIL, ERROR, WARN, PASS, SKIP. Nothing at all is ERROR, never PASS."""
    if not states:
        return "ERROR"
    return max(states, key=lambda s: _RANK[s])


def group_nodes(results: Sequence[CheckResult]) -> list[tuple[CheckResult, list[str]]]:
    """Results that differ in nothing a reader sees but the node, as one result with its nodes."""
    groups: dict[tuple[str, ...], tuple[CheckResult, list[str]]] = {}
    for r in results:
        key = (r.state, r.id, r.measured, r.expected)
        groups.setdefault(key, (r, []))[1].append(r.node)
    return list(groups.values())


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The gate's word on one attempt. Training trusts it only for this job id, node list and configuration."""

    state: State
    job_id: str | None
    config_hash: str
    nodes: tuple[str, ...]
    created_at: float
    results: tuple[CheckResult, ...]

    @property
    def exclude(self) -> tuple[str, ...]:
        """Nodes that a failed check blames, for `--exclude=`; a pair or a failed collective names no culprit."""
        failed = [r for r in self.results if r.state == "FAIL" and r.id not in UNATTRIBUTED]
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
        told = "; ".join(f"{', '.join(nodes)} {r.id} ({r.measured})" for r, nodes in faults[:3])
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        return f"preflight {self.state}: {told}{more}"

    def to_json(self) -> dict[str, Any]:
        """The JSON of verdict.json."""
        return {
            "schema_version": 1,
            "state": self.state,
            "job_id": self.job_id,
            "config_hash": self.config_hash,
            "nodes": list(self.nodes),
            "created_at": self.created_at,
            "exclude": list(self.exclude),
            "results": [asdict(r) for r in self.results],
        }

    def to_report(self) -> dict[str, Any]:
        """The JSON that `janus-cluster preflight --json` prints: by node what is of one node, the rest apart."""
        by_node: dict[str, list[dict[str, Any]]] = {node: [] for node in self.nodes}
        cross: list[dict[str, Any]] = []
        for r in self.worst_first():
            apart = r.phase == "cross_node" or r.node not in by_node
            (cross if apart else by_node[r.node]).append(asdict(r))
        return {
            "verdict": self.state,
            "exit_code": EXIT_CODES[self.state],
            "nodes": by_node,
            "cross_node": cross,
            "exclude": list(self.exclude),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Verdict:
        """The verdict that `to_json` wrote. Raises: KeyError, TypeError."""
        return cls(
            state=value["state"],
            job_id=value["job_id"],
            config_hash=value["config_hash"],
            nodes=tuple(value["nodes"]),
            created_at=value["created_at"],
            results=tuple(CheckResult(**r) for r in value["results"]),
        )
