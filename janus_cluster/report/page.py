"""The page of a report: pure functions from histories to one HTML text that asks no other place for anything."""

from __future__ import annotations

import base64
import html
import math
import time
from collections.abc import Iterable, Sequence

from janus_cluster.report.history import Event, History
from janus_cluster.report.pictures import Picture
from janus_cluster.report.summary import ROWS, compare_settings, render_value, summarize

# Checkpoints of a month would hide the rest.
_MAX_EVENTS = 200
_KINDS = {
    "gate": "gate", "start": "first step", "resume": "resumed", "checkpoint": "checkpoint",
    "checkpoint_broken": "broken checkpoint", "stop": "stopped on purpose", "export": "exported",
}  # fmt: skip
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1040px; margin: 2em auto;
       padding: 0 1em; }
h1 { font-size: 1.5em; overflow-wrap: anywhere; } h2 { font-size: 1.15em; margin-top: 2em; }
img { max-width: 100%; height: auto; display: block; }
table { border-collapse: collapse; font-size: 14px; } .wide { width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .25em .8em .25em 0; border-bottom: 1px solid #ddd; }
td { overflow-wrap: anywhere; } td.number { text-align: right; white-space: nowrap; }
.quiet { color: #666; } code { font-size: 13px; }
"""


def render_page(
    histories: Sequence[History], pictures: Sequence[tuple[str, Sequence[Picture]]], *, made_at: float
) -> str:
    """The whole page. `pictures`: groups of a heading (empty for a single run) and the pictures below it."""
    title = " and ".join(h.name for h in histories)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">",
        f"<title>{_escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{_escape(title)}</h1>",
        f'<p class="quiet">made {_time(made_at)} by janus-cluster report</p>',
        _summary(histories),
    ]
    for heading, group in pictures:
        parts += [f"<h2>{_escape(heading)}</h2>"] if heading else []
        parts += [_picture(p, level=3 if heading else 2) for p in group]
    parts.append('<p class="quiet">Pale lines are the values as logged, strong ones their running median.</p>')
    parts += [part for h in histories for part in (_attempts(h, histories), _events(h, histories))]
    if len(histories) == 2:
        parts.append(_differences(histories[0], histories[1]))
    parts += [_configuration(h, histories) for h in histories]
    return "\n".join([*filter(None, parts), "</body></html>", ""])


def _summary(histories: Sequence[History]) -> str:
    summaries = [summarize(h) for h in histories]
    rows = []
    for key, label, form in ROWS:
        values = [render_value(s, key, form) for s in summaries]
        if set(values) != {"–"}:
            rows.append([label, *values])
    notes = "".join(f'<p class="quiet">{_escape(h.name)}: {_escape(note)}</p>' for h in histories for note in h.notes)
    places = "".join(f'<p class="quiet"><code>{_escape(h.source)}</code></p>' for h in histories)
    heads = ["", *(h.name for h in histories)] if len(histories) > 1 else []
    return places + _table(heads, rows, wide=False) + notes


def _picture(picture: Picture, *, level: int) -> str:
    data = base64.b64encode(picture.png).decode("ascii")
    title = _escape(picture.title)
    return f'<h{level}>{title}</h{level}>\n<img alt="{title}" src="data:image/png;base64,{data}">'


def _attempts(history: History, histories: Sequence[History]) -> str:
    if not history.attempts:
        return ""
    rows = [
        [
            str(a.number),
            _time(a.started_at),
            _duration(a.ended_at - a.started_at),
            "" if a.from_step is None else str(a.from_step),
            a.state if a.exit_code is None else f"{a.state} ({a.exit_code})",
            ", ".join(a.nodes),
            a.reason,
        ]
        for a in history.attempts
    ]
    heads = ["", "began", "lasted", "from step", "state (exit code)", "nodes", "reason"]
    return _heading("Attempts", history, histories) + _table(heads, rows)


def _events(history: History, histories: Sequence[History]) -> str:
    if not history.events:
        return ""
    shown = list(history.events)[-_MAX_EVENTS:]
    more = len(history.events) - len(shown)
    rows = [_event_row(e) for e in shown]
    left_out = f'<p class="quiet">{more} earlier ones are not shown</p>' if more else ""
    heads = ["time", "attempt", "step", "event", ""]
    return _heading("Events", history, histories) + left_out + _table(heads, rows)


def _event_row(event: Event) -> list[str]:
    numbers = ["" if n is None else str(n) for n in (event.attempt, event.step)]
    return [_time(event.time), *numbers, _KINDS.get(event.kind, event.kind), event.text]


def _differences(a: History, b: History) -> str:
    heading = "<h2>Differences of the configurations</h2>"
    if not a.settings or not b.settings:
        without = " and ".join(h.name for h in (a, b) if not h.settings)
        return f"{heading}<p>{_escape(without)} tells no configuration: nothing to compare.</p>"
    found = compare_settings(a, b)
    if not found:
        return f"{heading}<p>none</p>"
    rows = [[d.key, *("–" if v is None else v for v in (d.a, d.b))] for d in found]
    return heading + _table(["key", a.name, b.name], rows)


def _configuration(history: History, histories: Sequence[History]) -> str:
    """The values that are not the default, and where each came from."""
    rows = [[key, s.value, s.origin] for key, s in history.settings.items() if not s.is_default]
    if not rows:
        return ""
    heading = _heading("Configuration: what is not the default", history, histories)
    return heading + _table(["key", "value", "from"], rows)


def _heading(text: str, history: History, histories: Sequence[History]) -> str:
    of = f" of {history.name}" if len(histories) > 1 else ""
    return f"<h2>{_escape(text + of)}</h2>\n"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, wide: bool = True) -> str:
    lines = [f'<table class="{"wide" if wide else ""}">']
    if any(heads):
        lines.append("<tr>" + "".join(f"<th>{_escape(h)}</th>" for h in heads) + "</tr>")
    lines += ["<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "</table>"])


def _time(time_s: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(time_s))
    except (ValueError, OverflowError, OSError):
        return "–"


def _duration(seconds: float) -> str:
    from janus_cluster.observe.status import render_duration

    return render_duration(seconds) if math.isfinite(seconds) else "–"


def _escape(text: str) -> str:
    return html.escape(text, quote=True)
