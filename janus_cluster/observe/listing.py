"""`janus-cluster list`: the runs of a folder, newest first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from janus_cluster.observe.find import list_runs
from janus_cluster.observe.status import RunStatus, collect_status, render_source, state_style

if TYPE_CHECKING:
    from rich.console import RenderableType


def collect_list(runs_dirs: Sequence[Path], *, limit: int, max_age_s: float = 0.0) -> list[RunStatus]:
    """The newest `limit` runs with their states, from one Slurm query for all of them."""
    return collect_status(list_runs(runs_dirs)[:limit], max_age_s=max_age_s)


def render_list(statuses: Sequence[RunStatus]) -> RenderableType:
    """One line per run."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("job", "name", "state", "try", "step", "according to"):
        table.add_column(heading, overflow="fold", no_wrap=heading in ("job", "state", "try", "step"))
    for s in statuses:
        p = s.progress
        table.add_row(
            s.job_id or "-",
            Text(s.name),
            Text(s.state.state, style=state_style(s.state)),
            "-" if s.state.attempt is None else str(s.state.attempt),
            "-" if p.step is None else f"{p.step}/{p.total_steps or '?'}",
            Text(render_source(s.state)),
        )
    return table
