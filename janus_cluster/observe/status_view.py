"""What `janus-cluster status` prints: a table of the runs, and the notes below it."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from janus_cluster.diagnosis.card import render_card
from janus_cluster.observe.liveline import render_start
from janus_cluster.observe.planned import describe_plan
from janus_cluster.observe.progress import Progress
from janus_cluster.observe.status import RunStatus, next_commands
from janus_cluster.run.hosts import fold_nodes
from janus_cluster.run.records.verdict import CheckResult, group_nodes
from janus_cluster.run.table import columns_to_drop, fold_line
from janus_cluster.run.text import clean_line
from janus_cluster.run.times import render_duration
from janus_cluster.slurm.pending import read_reason
from janus_cluster.slurm.state import WAITING, JobState

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

# In a table: blanks between columns, and what a column that may be folded is not folded below.
_GAP = 2
_NARROWEST = 12


def render_status(statuses: Sequence[RunStatus], *, width: int | None = None) -> RenderableType:
    """A table of the runs, and below it, for each run that asks for it, what happened and what to type next.

    Units: width columns of the terminal; None for no limit.
    """
    from rich.console import Group
    from rich.text import Text

    rows = []
    for s in statuses:
        p = s.progress
        values = (
            _or_dash(s.state.attempt),
            f"{p.step}/{p.total_steps or '?'}" if p.step is not None else "-",
            _or_dash(p.loss, ".4f"),
            _or_dash(p.step_time_s, ".2f"),
            _or_dash(p.samples_per_s, ".2f"),
            render_duration(s.eta_s) if s.eta_s is not None else "-",
        )
        state = Text(s.state.state, style=state_style(s.state))
        rows.append([Text(s.job_id or "-"), Text(s.name), state, *map(Text, values)])
    headings = ("job", "name", "state", "try", "step", "loss", "s/step", "samples/s", "ETA")
    table = build_table(headings, rows, folded="name", width=width, droppable=("samples/s", "try", "s/step"))
    notes = [note for s in statuses for note in render_notes(s)]
    # Text leaves square brackets alone, and a command that is not folded can be copied whole.
    return Group(table, *(Text(fold_line(line, width=width), no_wrap=True, overflow="ignore") for line in ["", *notes]))


def build_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[Text]],
    *,
    folded: str,
    width: int | None,
    droppable: Sequence[str] = (),
) -> Table:
    """A table of which only the column `folded` gives way to a narrow terminal, after `droppable` ones.

    It may be wider than `width`; the terminal breaks its lines then, as it does with any other text.
    """
    from rich.cells import cell_len
    from rich.table import Table

    widths = [max([cell_len(heading), *(row[i].cell_len for row in rows)]) for i, heading in enumerate(headings)]
    cells = dict(zip(headings, widths, strict=True)) | {folded: min(_NARROWEST, widths[headings.index(folded)])}
    dropped = columns_to_drop(cells, width=width, gap=_GAP, droppable=droppable)
    kept = [i for i, heading in enumerate(headings) if heading not in dropped]
    headings, widths = [headings[i] for i in kept], [widths[i] for i in kept]
    at = headings.index(folded)
    if width is not None and (room := width - _GAP * (len(widths) - 1) - sum(widths) + widths[at]) >= _NARROWEST:
        widths[at] = min(widths[at], room)
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold")
    for heading, cell in zip(headings, widths, strict=True):
        table.add_column(heading, overflow="fold", width=cell)
    for row in rows:
        table.add_row(*(row[i] for i in kept))
    return table


def render_notes(status: RunStatus) -> list[str]:
    """What happened to the run, what it left, and what to type next: one line each, not folded."""
    state, progress = status.state, status.progress
    code = f", exit code {state.exit_code}" if state.exit_code is not None else ""
    on = f" on {fold_nodes(state.nodes)}" if state.nodes else ""
    lines = [f"{status.ref}: {state.state}{on}{code} (source: {render_source(state)})"]
    # The card has it as its error, and for a run that was never submitted the next command explains it.
    message = (status.card.failure.message or "") if status.card is not None else ""
    is_in_card = state.reason in (message, message.partition("\n")[0])
    if state.reason and not status.failed_checks and not is_in_card and state.state != "NOT_SUBMITTED":
        is_stuck = state.state in WAITING and read_reason(state.reason, job_id="").outlook == "never"
        start = "" if is_stuck else render_start(state.starts_at, now=time.time())
        lines.append(f"  reason: {state.reason}{f'; {start}' if start else ''}")
    lines += [f"  {line}" for line in status.earlier]
    if status.retry:
        lines.append(f"  {status.retry}")
    lines += [f"  {line}" for line in describe_balance(progress, status.rank_nodes)]
    lines += [f"  slow: {slow.message}" for slow in status.slow]
    job_file = shlex.quote(str(status.run.links.job_yaml))
    lines += [f"  {line}" for line in describe_plan(progress, status.plan_step_time_s, job_file=job_file)]
    if progress.action_accuracy is not None and state.is_final:
        majority = progress.majority_accuracy
        beside = f" (majority class {majority:.3f})" if majority is not None else ""
        lines.append(f"  held-out action accuracy: {progress.action_accuracy:.3f}{beside}")
    if status.card is None:
        lines += _describe_checks(status.failed_checks)
        lines += [f"  checkpoint: {progress.checkpoint}"] if state.is_final and progress.checkpoint else []
    lines += render_failure(status)
    if state.is_final:
        lines += [f"  exported model: {progress.export}"] if progress.export else []
    lines += [f"  next: {command}" for command in next_commands(status)]
    return [_clean_indented(line) for line in lines]


def render_failure(status: RunStatus) -> list[str]:
    """The lines of the run's card, with the failed checks in it; none for a run without a card."""
    if status.card is None:
        return []
    return [
        _clean_indented(line)
        for line in render_card(status.card, instead_of_error=_describe_checks(status.failed_checks))
    ]


def _describe_checks(checks: Sequence[CheckResult]) -> list[str]:
    """Each fault once, with all nodes that have it, and the fix of the first."""
    lines = []
    for check, nodes in group_nodes(checks):
        where = fold_nodes([node or "all nodes" for node in nodes])
        lines.append(f"  {check.state} {check.id} on {where}: {check.measured} (expected: {check.expected})")
        lines += [f"    fix: {check.fix}"] if check.fix else []
    return lines


# What is shown of the ranks, in this order: uneven memory usually has its reason on the next line.
_BALANCE = (
    ("gpu_memory_peak_gb", "GPU memory peak", ".1f", " GB"),
    ("visual_tokens", "visual tokens a step", ",.0f", ""),
    ("data_wait_s", "waiting for data a step", ".2f", " s"),
)


def describe_balance(progress: Progress, nodes: Mapping[int, str] | None = None) -> list[str]:
    """The lowest and the highest rank of everything that differs between ranks, each with its node where it is known;
    nothing for a single rank.
    """
    lines = []
    for key, label, form, unit in _BALANCE:
        values = progress.ranks.get(key, ())
        if len(values) < 2 or not all(map(math.isfinite, values)):
            continue
        low, high = (f"{v:{form}}{unit}" for v in (min(values), max(values)))
        if low == high:
            lines.append(f"{label}: {low} on all {len(values)} ranks")
            continue
        least, most = (_name_rank(values.index(v), nodes or {}) for v in (min(values), max(values)))
        lines.append(f"{label}: {low} ({least}) to {high} ({most})")
    return lines


def _name_rank(rank: int, nodes: Mapping[int, str]) -> str:
    return f"rank {rank} on {nodes[rank]}" if rank in nodes else f"rank {rank}"


def _clean_indented(text: str) -> str:
    """The line without control characters, its indentation kept."""
    return text[: len(text) - len(text.lstrip(" "))] + clean_line(text)


def state_style(state: JobState) -> str:
    """The colour of a state."""
    if state.state == "COMPLETED":
        return "green"
    if state.state == "RUNNING":
        return "cyan"
    return "red" if state.is_final and state.state not in ("STOPPED", "CANCELLED") else "yellow"


def render_source(state: JobState) -> str:
    """The state's source and its age."""
    return state.source if state.age_s is None else f"{state.source}, {render_duration(state.age_s)} ago"


def _or_dash(value: float | int | None, form: str = "") -> str:
    return "-" if value is None else format(value, form)
