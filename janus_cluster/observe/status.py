"""`janus-cluster status`: where runs stand, and for a failed one what failed and what to type next."""

from __future__ import annotations

import math
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from janus_cluster.observe.card import FailureCard, card_to_json, load_card, load_job, render_card
from janus_cluster.observe.liveline import render_start
from janus_cluster.observe.planned import describe_plan, load_plan_step_time
from janus_cluster.observe.progress import Progress, load_progress
from janus_cluster.observe.text import clean_line
from janus_cluster.rundir import RunDir, read_json
from janus_cluster.slurm.recorded import load_submission
from janus_cluster.slurm.state import NOBODY, JobState, load_job_states

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

_GATE_EXIT_CODES = (10, 11)
_MOST_EARLIER = 4
# In a table: blanks between columns, and what a column that may be folded is not folded below.
_GAP = 2
_NARROWEST = 12


@dataclass(frozen=True, kw_only=True)
class FailedCheck:
    """One check of the gate that let no training begin."""

    id: str
    node: str | None
    state: str
    measured: str
    expected: str
    fix: str | None


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """One run: its state, its progress, and what the gate held against it."""

    run: RunDir
    job_id: str | None
    state: JobState
    progress: Progress = field(default_factory=Progress)
    failed_checks: tuple[FailedCheck, ...] = ()
    exclude: tuple[str, ...] = ()
    card: FailureCard | None = None
    retry: str | None = None
    # How the attempts before this one ended, the newest last.
    earlier: tuple[str, ...] = ()
    # Which node each rank of the last logged step ran on.
    rank_nodes: Mapping[int, str] = field(default_factory=dict)
    plan_step_time_s: float | None = None

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def ref(self) -> str:
        """What a user types to mean this run."""
        return self.job_id or self.name

    def to_json(self) -> dict[str, Any]:
        """The object of `status JOB --json`: a contract, keys are neither renamed nor taken away.

        Units: …_s seconds, …_gb 1e9 bytes. `card` and `plan_step_time_s` are null where nobody asked for them (`list`).
        `ranks`: of the last logged step, see training/metrics.py.
        """
        progress = self.progress
        return {
            "job_id": self.job_id,
            "name": self.name,
            "state": self.state.state,
            "source": self.state.source,
            "age_s": self.state.age_s,
            "attempt": self.state.attempt,
            "nodes": list(self.state.nodes),
            "step": progress.step,
            "total_steps": progress.total_steps,
            "exit_code": self.state.exit_code,
            "reason": self.state.reason,
            "run_dir": str(self.run.path),
            "slurm_age_s": self.state.slurm_age_s,
            "loss": progress.loss,
            "step_time_s": progress.step_time_s,
            "median_step_time_s": progress.median_step_time_s,
            "plan_step_time_s": self.plan_step_time_s,
            "samples_per_s": progress.samples_per_s,
            "eta_s": self.eta_s,
            "action_accuracy": progress.action_accuracy,
            "majority_accuracy": progress.majority_accuracy,
            "checkpoint": progress.checkpoint,
            "export": progress.export,
            "ranks": self.ranks_to_json(),
            "earlier": list(self.earlier),
            "failed_checks": [asdict(check) for check in self.failed_checks],
            "exclude": list(self.exclude),
            "retry": self.retry,
            "card": card_to_json(self.card) if self.card is not None else None,
            "next": next_commands(self) or list(self.card.next_steps if self.card else ()),
        }

    @property
    def eta_s(self) -> float | None:
        """Seconds to the last step; None for a run that does not train now."""
        return self.progress.eta_s if self.state.state == "RUNNING" else None

    def ranks_to_json(self) -> list[dict[str, Any]]:
        """An object for every rank that was logged, with the node it ran on."""
        values = self.progress.ranks
        count = max((len(v) for v in values.values()), default=0)
        return [
            {"rank": r, "node": self.rank_nodes.get(r), **{k: v[r] if r < len(v) else None for k, v in values.items()}}
            for r in range(count)
        ]


def collect_status(runs: Sequence[RunDir], *, now: float | None = None, max_age_s: float = 0.0) -> list[RunStatus]:
    """Where every run stands, in order, from one Slurm query for all of them; `max_age_s` as in load_job_states."""
    states = load_job_states(runs, now=time.time() if now is None else now, max_age_s=max_age_s)
    return [load_run_status(run, state) for run, state in zip(runs, states, strict=True)]


def load_run_status(run: RunDir, state: JobState) -> RunStatus:
    """What the run folder says of a run in that state."""
    sent = load_submission(run)
    checks, exclude = _load_failed_checks(run, state)
    progress = load_progress(run)
    return RunStatus(
        run=run,
        job_id=sent.job_id if sent else None,
        state=state,
        progress=progress,
        failed_checks=checks,
        exclude=exclude,
        retry=_load_retry(run),
        earlier=load_earlier(run, state.attempt),
        rank_nodes=load_rank_nodes(run, progress.attempt) if progress.ranks else {},
    )


def load_rank_nodes(run: RunDir, attempt: int | None) -> dict[int, str]:
    """The node of each rank that left a log in that attempt."""
    if attempt is None:
        return {}
    names = (re.fullmatch(r"(.+)\.rank(\d+)\.log", p.name) for p in run.attempt_logs(attempt).glob("*.log"))
    return {int(m[2]): m[1] for m in names if m}


def load_earlier(run: RunDir, attempt: int | None) -> tuple[str, ...]:
    """A line for each of the last attempts before `attempt`, of those that left their record."""
    lines = []
    for number in [n for n in run.attempts() if attempt is not None and n < attempt][-_MOST_EARLIER:]:
        try:
            record = read_json(run.attempt_json(number))
            is_over = record["ended_at"] is not None
            words = record["reason"] or (None if is_over else "killed before it could say why")
            parts = (f"attempt {number}, from step {record['from_step']}", record["state"] if is_over else None, words)
            lines.append(": ".join(part for part in parts if part))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return tuple(lines)


def _load_retry(run: RunDir) -> str | None:
    """What preflight.on_fail did, in words; None where it did nothing."""
    try:
        record = read_json(run.retry_json)
        nodes = ", ".join(str(n) for n in record["exclude"])
        if record["requeued_at"] is None:
            return f"not tried again without {nodes}: {record['not_retried']}"
        return f"queued again without {nodes} after attempt {record['attempt']}: {record['reason']}"
    except (OSError, ValueError, KeyError, TypeError):
        return None


def add_card(status: RunStatus) -> RunStatus:
    """The same with the card of its failure, which is read from the run's logs; unchanged for a run without one."""
    return replace(status, card=load_card(status.run, status.state, ref=shlex.quote(status.ref)))


def add_plan(status: RunStatus) -> RunStatus:
    """The same with the planned seconds a step; unchanged for a run that has logged no step, or no GPU of ours."""
    if status.progress.step_time_s is None:
        return status
    planned_s = load_plan_step_time(status.run, attempt=status.progress.attempt, nodes=status.state.nodes)
    return replace(status, plan_step_time_s=planned_s)


def _load_failed_checks(run: RunDir, state: JobState) -> tuple[tuple[FailedCheck, ...], tuple[str, ...]]:
    if state.attempt is None or state.state != "FAILED" or state.exit_code not in _GATE_EXIT_CODES:
        return (), ()
    try:
        verdict = read_json(run.verdict_json(state.attempt))
        results = [r for r in verdict["results"] if r["state"] in ("FAIL", "ERROR")]
        return tuple(_failed_check(r) for r in results), tuple(str(n) for n in verdict.get("exclude") or ())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return (), ()


def _failed_check(result: dict[str, Any]) -> FailedCheck:
    return FailedCheck(
        id=str(result["id"]),
        node=result.get("node"),
        state=str(result["state"]),
        measured=str(result.get("measured")),
        expected=str(result.get("expected")),
        fix=result.get("fix"),
    )


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
    table = build_table(headings, rows, folded="name", width=width)
    notes = [note for s in statuses for note in _notes(s)]
    # Text leaves square brackets alone, and a command that is not folded can be copied whole.
    return Group(table, *(Text(line, no_wrap=True, overflow="ignore") for line in ["", *notes]))


def build_table(headings: Sequence[str], rows: Sequence[Sequence[Text]], *, folded: str, width: int | None) -> Table:
    """A table of which only the column `folded` gives way to a narrow terminal: half a number would be a wrong one.

    It may be wider than `width`; the terminal breaks its lines then, as it does with any other text.
    """
    from rich.cells import cell_len
    from rich.table import Table

    widths = [max([cell_len(heading), *(row[i].cell_len for row in rows)]) for i, heading in enumerate(headings)]
    at = headings.index(folded)
    if width is not None and (room := width - _GAP * (len(widths) - 1) - sum(widths) + widths[at]) >= _NARROWEST:
        widths[at] = min(widths[at], room)
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold")
    for heading, cells in zip(headings, widths, strict=True):
        table.add_column(heading, overflow="fold", width=cells)
    for row in rows:
        table.add_row(*row)
    return table


def _notes(status: RunStatus) -> list[str]:
    state, progress, ref = status.state, status.progress, status.ref
    code = f", exit code {state.exit_code}" if state.exit_code is not None else ""
    on = f" on {', '.join(state.nodes)}" if state.nodes else ""
    lines = [f"{ref}: {state.state}{on}{code} (says {render_source(state)})"]
    # The card has it as its error, and a run that was never submitted is told what to type.
    is_told = status.card is not None and status.card.failure.message == state.reason
    if state.reason and not status.failed_checks and not is_told and state.state != "NOT_SUBMITTED":
        start = render_start(state.starts_at, now=time.time())
        lines.append(f"  reason: {state.reason}{f'; {start}' if start else ''}")
    lines += [f"  {line}" for line in status.earlier]
    if status.retry:
        lines.append(f"  {status.retry}")
    lines += [f"  {line}" for line in describe_balance(progress, status.rank_nodes)]
    job_file = shlex.quote(str(status.run.job_yaml))
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


def _describe_checks(checks: Sequence[FailedCheck]) -> list[str]:
    """Each fault once, with all nodes that have it, and the first of them to mend."""
    alike: dict[tuple[str, ...], list[FailedCheck]] = {}
    for check in checks:
        alike.setdefault((check.state, check.id, check.measured, check.expected), []).append(check)
    lines = []
    for first, *others in alike.values():
        where = ", ".join(check.node or "all nodes" for check in (first, *others))
        lines.append(f"  {first.state} {first.id} on {where}: {first.measured} (expected: {first.expected})")
        lines += [f"    fix: {first.fix}"] if first.fix else []
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


def next_commands(status: RunStatus) -> list[str]:
    """What a user would type now; what is said of a command is a comment behind it."""
    state, ref = status.state, shlex.quote(status.ref)
    if state.state == "NOT_SUBMITTED":
        return [submit_by_hand(status.run)]
    if not state.is_final:
        return [f"janus-cluster tail {ref}"]
    if state.state == "COMPLETED":
        again = f"janus-cluster submit {shlex.quote(str(status.run.job_yaml))}"
        if (status.job_id or "").startswith("local-"):
            return [f"janus-cluster sandbox up && {again} --cluster sandbox --follow   # the same on a real Slurm"]
        return [f"{again}   # the same again"]
    if status.card is not None and status.card.next_steps:
        return []
    if not status.failed_checks or state.attempt is None:
        return [f"janus-cluster tail {ref} --no-follow -n 100"]
    commands = [f"less {shlex.quote(str(status.run.verdict_md(state.attempt)))}   # every check"]
    if load_job(status.run).get("kind") == "preflight":
        return [*commands, f"janus-cluster preflight {shlex.quote(str(status.run.job_yaml))}   # when it is mended"]
    # Where every node failed the fault is the job's: there would be nothing left to run on.
    if status.exclude and len(status.exclude) < len(state.nodes):
        without = f"--set slurm.exclude={','.join(status.exclude)}"
        commands.append(f"janus-cluster resume {ref} {without}   # the same run on other nodes")
    return [*commands, f"janus-cluster resume {ref}   # the same run, when it is mended"]


def submit_by_hand(run: RunDir) -> str:
    """The line that starts a run which was written and never sent."""
    try:
        is_local = read_json(run.resolved_json)["cluster"] == "local"
    except (OSError, ValueError, KeyError, TypeError):
        is_local = False
    return f"{'JANUS_LAUNCHER=local bash' if is_local else 'sbatch'} {shlex.quote(str(run.job_sbatch))}"


def state_style(state: JobState) -> str:
    """The colour of a state."""
    if state.state == "COMPLETED":
        return "green"
    if state.state == "RUNNING":
        return "cyan"
    return "red" if state.is_final and state.state not in ("STOPPED", "CANCELLED") else "yellow"


def render_source(state: JobState) -> str:
    """Who said it, and how long ago; and of what age Slurm's word was that it was held against."""
    source = "nobody" if state.source == NOBODY else state.source
    said = source if state.age_s is None else f"{source}, {render_duration(state.age_s)} ago"
    return said if state.slurm_age_s is None else f"{said}; Slurm was asked {render_duration(state.slurm_age_s)} ago"


def render_duration(seconds: float) -> str:
    """`42 s`, `12 min`, `3 h 05 min`, `2 d 4 h`."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 3 * 3600:
        return f"{whole // 60} min"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def _or_dash(value: float | int | None, form: str = "") -> str:
    return "-" if value is None else format(value, form)
