"""`janus-cluster list`: the runs of a folder, newest first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from janus_cluster.observe.find import list_runs, run_kind
from janus_cluster.observe.status import RunStatus, collect_status
from janus_cluster.observe.status_view import build_table, render_source, state_style
from janus_cluster.run.current import has_bundles
from janus_cluster.slurm.state import JobState

if TYPE_CHECKING:
    from rich.console import RenderableType


def collect_list(runs_dirs: Sequence[Path], *, limit: int) -> list[RunStatus]:
    """The newest `limit` runs with their states, from one Slurm query for all of them; run folders of 0.1 without."""
    runs = list_runs(runs_dirs)[:limit]
    readable = {status.run: status for status in collect_status([run for run in runs if has_bundles(run)])}
    old = JobState(state="UNKNOWN", source="made by janus-cluster 0.1", reason="this version cannot read its folder")
    return [readable.get(run) or RunStatus(run=run, job_id=None, state=old) for run in runs]


def render_list(statuses: Sequence[RunStatus], *, width: int | None = None) -> RenderableType:
    """One line per run. Units: width columns of the terminal; None for no limit."""
    from rich.text import Text

    rows = []
    for s in statuses:
        p = s.progress
        state = Text(s.state.state, style=state_style(s.state))
        attempt = "-" if s.state.attempt is None else str(s.state.attempt)
        step = "-" if p.step is None else f"{p.step}/{p.total_steps or '?'}"
        rows.append(
            [
                Text(s.job_id or "-"),
                Text(s.name),
                Text(run_kind(s.run)),
                state,
                Text(attempt),
                Text(step),
                Text(render_source(s.state)),
            ]
        )
    # A name is there to be copied.
    headings = ("job", "name", "kind", "state", "try", "step", "according to")
    return build_table(headings, rows, folded="according to", width=width, droppable=("try", "step", "kind"))
