"""`janus-cluster list`: the runs of a folder, newest first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from janus_cluster.observe.find import list_runs
from janus_cluster.observe.status import RunStatus, build_table, collect_status, render_source, state_style

if TYPE_CHECKING:
    from rich.console import RenderableType


def collect_list(runs_dirs: Sequence[Path], *, limit: int, max_age_s: float = 0.0) -> list[RunStatus]:
    """The newest `limit` runs with their states, from one Slurm query for all of them."""
    return collect_status(list_runs(runs_dirs)[:limit], max_age_s=max_age_s)


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
            [Text(s.job_id or "-"), Text(s.name), state, Text(attempt), Text(step), Text(render_source(s.state))]
        )
    # A name is there to be copied.
    headings = ("job", "name", "state", "try", "step", "according to")
    return build_table(headings, rows, folded="according to", width=width)
