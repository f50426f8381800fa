"""What a check says, and how the worst of many wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["PASS", "WARN", "FAIL", "SKIP", "ERROR"]
Phase = Literal["static", "cross_node", "active"]

# FAIL outranks ERROR: a fault that was measured says more than one that could not be.
_RANK: dict[str, int] = {"SKIP": 0, "PASS": 1, "WARN": 2, "ERROR": 3, "FAIL": 4}

# `janus-cluster preflight` ends with these; a gate that only skipped has proven nothing.
EXIT_CODES: dict[str, int] = {"PASS": 0, "WARN": 1, "FAIL": 2, "ERROR": 3, "SKIP": 3}


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


def worst(states: Sequence[State]) -> State:
    """The state that wins: FAIL, ERROR, WARN, PASS, SKIP. Nothing at all is ERROR, never PASS."""
    if not states:
        return "ERROR"
    return max(states, key=lambda s: _RANK[s])


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
        """Nodes with a failed check of their own, for `--exclude=`; a failed all-reduce names no culprit."""
        bad = {r.node for r in self.results if r.state == "FAIL" and r.phase == "static"}
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
        faults = [r for r in self.worst_first() if r.state in ("FAIL", "ERROR", "WARN")]
        if not faults:
            return f"preflight {self.state}"
        told = "; ".join(f"{r.node} {r.id} ({r.measured})" for r in faults[:3])
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
