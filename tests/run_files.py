"""Files of a run folder as tests write and read them, beside the types in janus_cluster/run/records/."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from janus_cluster.run.files import append_line
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.verdict import CheckResult, State, Verdict

# (node, id, state, what was measured)
Row = tuple[str, str, State, str]


def write_verdict(
    run: RunDir,
    attempt: int,
    rows: Iterable[Row] = (),
    *,
    state: State = "FAIL",
    nodes: tuple[str, ...] | None = None,
    created_at: float = 1.0,
    **of_each: Any,
) -> None:
    """Write the verdict of an attempt with these results into the run folder."""
    values: dict[str, Any] = {"phase": "static", "expected": "8"} | of_each
    results = tuple(CheckResult(node=n, id=i, state=s, measured=m, **values) for n, i, s, m in rows)
    Verdict(
        state=state,
        job_id="7",
        config_hash="x",
        nodes=tuple(sorted({r.node for r in results})) if nodes is None else nodes,
        created_at=created_at,
        results=results,
    ).write(run.verdict_json(attempt))


def read_metric_lines(run: RunDir) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl as they are on the disk."""
    if not run.metrics_jsonl.exists():
        return []
    return [json.loads(line) for line in run.metrics_jsonl.read_text(encoding="utf-8").splitlines()]


def append_metric_line(run: RunDir, record: Mapping[str, Any]) -> None:
    """metrics.jsonl has this object as one line more."""
    append_line(run.metrics_jsonl, json.dumps(record))
