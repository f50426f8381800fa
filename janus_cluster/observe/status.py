"""`janus-cluster status`: where runs stand, and for a failed one what failed and what to type next."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from janus_cluster.observe.card import FailureCard, load_card, render_card
from janus_cluster.observe.progress import Progress, load_progress
from janus_cluster.observe.text import clean_line
from janus_cluster.rundir import RunDir, read_json
from janus_cluster.slurm.recorded import load_submission
from janus_cluster.slurm.state import JobState, load_job_states

if TYPE_CHECKING:
    from rich.console import RenderableType

_GATE_EXIT_CODES = (10, 11)
_MOST_EARLIER = 4


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

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def ref(self) -> str:
        """What a user types to mean this run."""
        return self.job_id or self.name

    def to_json(self) -> dict[str, Any]:
        """The object of `status JOB --json`: a contract, keys are neither added nor taken away lightly."""
        return {
            "job_id": self.job_id,
            "name": self.name,
            "state": self.state.state,
            "source": self.state.source,
            "age_s": self.state.age_s,
            "attempt": self.state.attempt,
            "nodes": list(self.state.nodes),
            "step": self.progress.step,
            "total_steps": self.progress.total_steps,
            "exit_code": self.state.exit_code,
            "reason": self.state.reason,
        }


def collect_status(runs: Sequence[RunDir], *, now: float | None = None) -> list[RunStatus]:
    """Where every run stands, in order, from one Slurm query for all of them."""
    states = load_job_states(runs, now=time.time() if now is None else now)
    return [_status_of(run, state) for run, state in zip(runs, states, strict=True)]


def _status_of(run: RunDir, state: JobState) -> RunStatus:
    sent = load_submission(run)
    checks, exclude = _load_failed_checks(run, state)
    return RunStatus(
        run=run,
        job_id=sent.job_id if sent else None,
        state=state,
        progress=load_progress(run),
        failed_checks=checks,
        exclude=exclude,
        retry=_load_retry(run),
        earlier=load_earlier(run, state.attempt),
    )


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
    return replace(status, card=load_card(status.run, status.state, ref=status.ref))


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


def render_status(statuses: Sequence[RunStatus]) -> RenderableType:
    """A table of the runs, and below it, for each run that asks for it, what happened and what to type next."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("job", "name", "state", "try", "step", "loss", "s/step", "samples/s", "ETA"):
        table.add_column(heading, overflow="fold", no_wrap=heading != "name")
    for s in statuses:
        p = s.progress
        table.add_row(
            s.job_id or "-",
            Text(s.name),
            Text(s.state.state, style=state_style(s.state)),
            _or_dash(s.state.attempt),
            f"{p.step}/{p.total_steps or '?'}" if p.step is not None else "-",
            _or_dash(p.loss, ".4f"),
            _or_dash(p.step_time_s, ".2f"),
            _or_dash(p.samples_per_s, ".2f"),
            render_duration(p.eta_s) if s.state.state == "RUNNING" and p.eta_s is not None else "-",
        )
    notes = [note for s in statuses for note in _notes(s)]
    # Text leaves square brackets alone, and a command that is not folded can be copied whole.
    return Group(table, *(Text(line, no_wrap=True, overflow="ignore") for line in ["", *notes]))


def _notes(status: RunStatus) -> list[str]:
    state, progress, ref = status.state, status.progress, status.ref
    code = f", exit code {state.exit_code}" if state.exit_code is not None else ""
    on = f" on {', '.join(state.nodes)}" if state.nodes else ""
    lines = [f"{ref}: {state.state}{on}{code} (says {render_source(state)})"]
    if state.reason:
        lines.append(f"  reason: {state.reason}")
    lines += [f"  {line}" for line in status.earlier]
    if status.retry:
        lines.append(f"  {status.retry}")
    for check in status.failed_checks:
        where = check.node or "all nodes"
        lines.append(f"  {check.state} {check.id} on {where}: {check.measured} (expected: {check.expected})")
        if check.fix:
            lines.append(f"    fix: {check.fix}")
    lines += [f"  {line}" for line in describe_balance(progress)]
    if progress.action_accuracy is not None and state.is_final:
        majority = progress.majority_accuracy
        beside = f" (majority class {majority:.3f})" if majority is not None else ""
        lines.append(f"  held-out action accuracy: {progress.action_accuracy:.3f}{beside}")
    if status.card is not None:
        lines += render_card(status.card)
    elif state.is_final and progress.checkpoint:
        lines.append(f"  checkpoint: {progress.checkpoint}")
    if state.is_final:
        lines += [f"  exported model: {progress.export}"] if progress.export else []
    lines += [f"  next: {command}" for command in next_commands(status)]
    return [_clean_indented(line) for line in lines]


# What is shown of the ranks, in this order: uneven memory usually has its reason on the next line.
_BALANCE = (
    ("gpu_memory_peak_gb", "GPU memory peak", ".1f", " GB"),
    ("visual_tokens", "visual tokens a step", ",.0f", ""),
    ("data_wait_s", "waiting for data a step", ".2f", " s"),
)


def describe_balance(progress: Progress) -> list[str]:
    """The lowest and the highest rank of everything that differs between ranks; nothing for a single rank."""
    lines = []
    for key, label, form, unit in _BALANCE:
        values = progress.ranks.get(key, ())
        if len(values) > 1:
            low, high = min(values), max(values)
            lines.append(
                f"{label}: {low:{form}}{unit} (rank {values.index(low)}) to {high:{form}}{unit} "
                f"(rank {values.index(high)})"
            )
    return lines


def _clean_indented(text: str) -> str:
    """The line without control characters, its indentation kept."""
    return text[: len(text) - len(text.lstrip(" "))] + clean_line(text)


def next_commands(status: RunStatus) -> list[str]:
    """What a user would type now."""
    state, ref = status.state, status.ref
    if state.state == "NOT_SUBMITTED":
        return [f"sbatch {status.run.job_sbatch}"]
    if not state.is_final:
        return [f"janus-cluster tail {ref}"]
    if state.state == "COMPLETED":
        again = f"janus-cluster submit {shlex.quote(str(status.run.job_yaml))}"
        if (status.job_id or "").startswith("local-"):
            return [f"janus-cluster sandbox up && {again} --cluster sandbox --follow   (the same on a real Slurm)"]
        return [f"{again}   (the same again)"]
    if status.card is not None and status.card.next_steps:
        return []
    commands = [f"janus-cluster tail {ref} --no-follow -n 100"]
    if status.failed_checks and state.attempt is not None:
        commands = [f"less {status.run.verdict_md(state.attempt)}"]
    # Where every node failed the fault is the job's: there would be nothing left to run on.
    if status.exclude and len(status.exclude) < len(state.nodes):
        commands.append(f"janus-cluster submit … --exclude {','.join(status.exclude)}")
    return commands


def state_style(state: JobState) -> str:
    """The colour of a state."""
    if state.state == "COMPLETED":
        return "green"
    if state.state == "RUNNING":
        return "cyan"
    return "red" if state.is_final and state.state not in ("STOPPED", "CANCELLED") else "yellow"


def render_source(state: JobState) -> str:
    """Who said it, and how long ago."""
    return state.source if state.age_s is None else f"{state.source}, {render_duration(state.age_s)} ago"


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
