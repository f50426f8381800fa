"""The verdict for people: a rich table in the terminal, Markdown for a ticket."""

from __future__ import annotations

from typing import TYPE_CHECKING

from janus_cluster.preflight.model import Verdict

if TYPE_CHECKING:
    from rich.console import Group

_STYLE = {"PASS": "green", "WARN": "yellow", "FAIL": "bold red", "ERROR": "bold magenta", "SKIP": "dim"}


def render_verdict(verdict: Verdict) -> Group:
    """A table, worst first, then one line per fault that says how to mend it."""
    from rich.console import Group  # not at import time: rich costs more than the whole start-up budget
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"preflight {verdict.state}", title_style=_STYLE[verdict.state], title_justify="left")
    for column in ("state", "node", "check", "measured", "expected", "threshold from"):
        table.add_column(column, overflow="fold")
    for r in verdict.worst_first():
        state = Text(r.state, style=_STYLE[r.state])
        measured = f"{r.measured} {r.unit}".strip()
        table.add_row(state, Text(r.node), Text(r.id), Text(measured), Text(r.expected), Text(r.threshold_source))
    mends = [Text(f"mend  {r.node} {r.id}: {r.fix}") for r in verdict.worst_first() if r.fix]
    exclude = [Text(f"without the bad nodes: --exclude={','.join(verdict.exclude)}")] if verdict.exclude else []
    return Group(table, *mends, *exclude)


def render_verdict_markdown(verdict: Verdict) -> str:
    """The same as Markdown, for pasting into a ticket."""
    rows = [
        f"| {r.state} | {r.node} | {r.id} | {_cell(f'{r.measured} {r.unit}')} | {_cell(r.expected)} "
        f"| {_cell(r.threshold_source)} | {_cell(r.fix)} |"
        for r in verdict.worst_first()
    ]
    head = [
        f"# preflight {verdict.state}",
        "",
        f"job {verdict.job_id}, nodes {', '.join(verdict.nodes)}, configuration {verdict.config_hash[:12]}",
        "",
        "| state | node | check | measured | expected | threshold from | mend |",
        "|---|---|---|---|---|---|---|",
    ]
    tail = ["", f"`--exclude={','.join(verdict.exclude)}`"] if verdict.exclude else []
    return "\n".join([*head, *rows, *tail, ""])


def _cell(text: str) -> str:
    return text.strip().replace("|", "\\|").replace("\n", " ")
