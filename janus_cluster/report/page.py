"""The page of a report: one HTML text, made from histories, that asks no other place for anything."""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Sequence
from pathlib import Path

from janus_cluster.job.templates import template_environment
from janus_cluster.report.drawing import MIN_SMOOTHED
from janus_cluster.report.history import History
from janus_cluster.report.pictures import Picture
from janus_cluster.report.summary import ROWS, compare_settings, describe_simulation, render_value, summarize
from janus_cluster.run.times import render_duration

# Checkpoints of a month would hide the rest.
_MAX_EVENTS = 200
_KINDS = {
    "gate": "gate", "start": "first step", "resume": "resumed", "checkpoint": "checkpoint",
    "checkpoint_broken": "broken checkpoint", "stop": "stopped on purpose", "export": "exported",
}  # fmt: skip


def render_page(
    histories: Sequence[History], pictures: Sequence[tuple[str, Sequence[Picture]]], *, made_at: float
) -> str:
    """The whole page. `pictures`: groups of a heading (empty for a single run) and the pictures below it."""
    environment = template_environment(Path(__file__).parent, is_html=True)
    environment.filters |= {
        "utc": _time,
        "duration": lambda seconds: render_duration(seconds) if math.isfinite(seconds) else "–",
        "base64": lambda data: base64.b64encode(data).decode("ascii"),
    }
    summaries = [summarize(h) for h in histories]
    rows = [[label, *(render_value(s, key, form) for s in summaries)] for key, label, form in ROWS]
    found = compare_settings(*histories) if len(histories) == 2 else []
    return environment.get_template("page.html.j2").render(
        title=" and ".join(h.name for h in histories),
        histories=histories,
        pictures=pictures,
        made_at=made_at,
        summary=[row for row in rows if set(row[1:]) != {"–"}],
        differences=[[d.key, *("–" if v is None else v for v in (d.a, d.b))] for d in found],
        kinds=_KINDS,
        max_events=_MAX_EVENTS,
        simulations=[line for h in histories if (line := describe_simulation(h)) is not None],
        is_smoothed=any(len(h.steps) >= MIN_SMOOTHED for h in histories),
    )


def _time(time_s: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(time_s))
    except (ValueError, OverflowError, OSError):
        return "–"
