"""One measured rate against every limit for it: the profile's, the median of its peers, the site's baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from janus_cluster.preflight.model import Check
from janus_cluster.run.records.verdict import CheckResult, State


@dataclass(frozen=True)
class Limit:
    """Below `value` the result is `state`; `source` is where the number is from."""

    value: float
    state: State
    source: str


def profile_limits(row: Mapping[str, Any] | None) -> list[Limit]:
    """The limits of a row {warn_below, fail_below, source} of a profile; either may be missing."""
    if not row:
        return []
    named: tuple[tuple[str, State], ...] = (("fail_below", "FAIL"), ("warn_below", "WARN"))
    return [Limit(float(row[key]), state, str(row["source"])) for key, state in named if key in row]


def baseline_limits(profile: Mapping[str, Any], test: str) -> list[Limit]:
    """Shares of what --calibrate measured for `test` at this site; none where the site has no baseline."""
    row = profile.get("baseline") or {}
    measured = (row.get("measured") or {}).get(test)
    if not measured:
        return []
    source = f"baseline of this site: {measured:.3g}"
    named: tuple[tuple[str, State], ...] = (("fail_below", "FAIL"), ("warn_below", "WARN"))
    return [Limit(float(row[key]) * measured, state, f"{row[key]:g} × {source}") for key, state in named if key in row]


def judge_rate(
    value: float, limits: Sequence[Limit], *, id: str, node: str, unit: str, detail: str, fix: str, what: str = ""
) -> CheckResult:
    """PASS at or above every limit; else the worst limit that the value is below, which the result then names."""
    broken = [limit for limit in limits if value < limit.value]
    # The strictest limit is the one to show: it is what was passed, or what failed first.
    shown = max(
        broken or limits, key=lambda limit: (limit.state == "FAIL" if broken else True, limit.value), default=None
    )
    check = Check(
        id=id,
        node=node,
        expected=f">= {shown.value:.3g} {unit}" if shown else "no limit is known",
        source=shown.source if shown else "",
        unit=unit,
        phase="active",
    )
    state: State = shown.state if broken and shown else ("PASS" if shown else "ERROR")
    return check.judged(state, f"{value:.3g} {unit}{what and ' ' + what} ({detail})", fix=fix)
