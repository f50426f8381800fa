"""Render the verdict: a rich table in the terminal, a few lines in a job's log, Markdown for a ticket."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from janus_cluster.run.hosts import fold_nodes
from janus_cluster.run.records.verdict import FAULTS, Verdict, group_nodes

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
        row = (Text(r.id), Text(fold_nodes(nodes)), Text(r.measured), Text(r.expected))
        table.add_row(Text(r.state, style=_STYLE[r.state]), *row)
    mends = [
        Text(f"mend  {fold_nodes(nodes)} {r.id}: {r.fix}") for r, nodes in group_nodes(verdict.worst_first()) if r.fix
    ]
    exclude = [Text(f"without the bad nodes: --exclude={','.join(verdict.exclude)}")] if verdict.exclude else []
    return Group(table, *mends, *exclude)


def render_summary(verdict: Verdict, *, details: str) -> list[str]:
    """The lines of a log: how many checks, every fault with its fix, and of a passed gate what it measured.

    details: path of the full report.
    """
    counts = Counter[str](r.state for r in verdict.results)
    tally = ", ".join(f"{counts[state]} {state}" for state in _STYLE if counts[state])
    lines = [f"preflight {verdict.state}: {tally}; every check: {details}"]
    faults = group_nodes([r for r in verdict.worst_first() if r.state in FAULTS])
    for r, nodes in faults:
        lines += [f"{r.state}  {r.id}  {fold_nodes(nodes)}", f"      measured  {r.measured}"]
        lines += [f"      expected  {r.expected}", *([f"      mend      {r.fix}"] if r.fix else [])]
    if verdict.exclude:
        lines.append(f"without the bad nodes: --exclude={','.join(verdict.exclude)}")
    return lines if faults else [*lines, *_measured(verdict)]


def _measured(verdict: Verdict) -> list[str]:
    """The rates of a passed gate; checks that are numbered, such as one per rail, are counted."""
    sound = [(r, nodes) for r, nodes in group_nodes(verdict.results) if r.phase == "active" and r.state == "PASS"]
    numbered = Counter(r.id.partition(".")[0] for r, _ in sound if "." in r.id)
    rates = [(r.id, f"{fold_nodes(nodes)}: {r.measured}; {r.expected}") for r, nodes in sound if "." not in r.id]
    return [f"  {name:<15} {value}" for name, value in [*rates, *((n, f"{c} sound") for n, c in numbered.items())]]


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
        f"job {verdict.job_id}, nodes {fold_nodes(verdict.nodes)}, configuration {verdict.config_hash[:12]}",
        "",
        "| state | node | check | measured | expected | threshold from | mend |",
        "|---|---|---|---|---|---|---|",
    ]
    tail = ["", f"`--exclude={','.join(verdict.exclude)}`"] if verdict.exclude else []
    return "\n".join([*head, *rows, *tail, ""])


def _cell(text: str) -> str:
    return text.strip().replace("|", "\\|").replace("\n", " ")
