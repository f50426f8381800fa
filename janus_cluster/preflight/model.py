"""A check of the gate before it has a result."""

from __future__ import annotations

from dataclasses import dataclass

from janus_cluster.run.records.verdict import CheckResult, Phase, State


@dataclass(frozen=True, kw_only=True)
class Check:
    """A check of one node; `judged` makes its result."""

    id: str
    node: str
    expected: str
    source: str
    unit: str = ""
    phase: Phase = "static"

    def judged(
        self, state: State, measured: str, *, fix: str = "", duration_s: float = 0.0, blames_node: bool = True
    ) -> CheckResult:
        """The result; `fix` is kept only where there is something to fix."""
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
            blames_node=blames_node or state != "FAIL",
        )
