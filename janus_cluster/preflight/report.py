"""The verdict for people: a rich table in the terminal, Markdown for a ticket."""

from __future__ import annotations

from typing import TYPE_CHECKING

from janus_cluster.preflight.model import CheckResult, Verdict

if TYPE_CHECKING:
    from rich.console import Group

_STYLE = {"PASS": "green", "WARN": "yellow", "FAIL": "bold red", "ERROR": "bold magenta", "SKIP": "dim"}


def render_verdict(verdict: Verdict) -> Group:
    """A table, worst first, equal results of several nodes on one line; then how to mend each fault."""
    from rich.console import Group  # not at import time: rich costs more than the whole start-up budget
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"preflight {verdict.state}", title_style=_STYLE[verdict.state], title_justify="left")
    for column in ("state", "check", "node", "measured", "expected"):
        table.add_column(column, overflow="fold", no_wrap=column == "state")
    for r, nodes in group_nodes(verdict.worst_first()):
        row = (Text(r.id), Text(", ".join(nodes)), Text(r.measured), Text(r.expected))
        table.add_row(Text(r.state, style=_STYLE[r.state]), *row)
    mends = [
        Text(f"mend  {', '.join(nodes)} {r.id}: {r.fix}") for r, nodes in group_nodes(verdict.worst_first()) if r.fix
    ]
    exclude = [Text(f"without the bad nodes: --exclude={','.join(verdict.exclude)}")] if verdict.exclude else []
    return Group(table, *mends, *exclude)


def group_nodes(results: list[CheckResult]) -> list[tuple[CheckResult, list[str]]]:
    """Results that differ in nothing a table shows but the node, as one result with its nodes."""
    groups: dict[tuple[str, ...], tuple[CheckResult, list[str]]] = {}
    for r in results:
        key = (r.state, r.id, r.measured, r.expected)
        groups.setdefault(key, (r, []))[1].append(r.node)
    return list(groups.values())


def render_verdict_markdown(verdict: Verdict) -> str:
    """Every result as Markdown, with the source of its threshold, for pasting into a ticket."""
    rows = [
        f"| {r.state} | {r.node} | {r.id} | {_cell(r.measured)} | {_cell(r.expected)} "
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
