"""`janus-cluster status`: the state of runs, and for a failed one what failed and what to type next."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from janus_cluster.diagnosis.card import FailureCard, card_to_json, load_card
from janus_cluster.observe.find import run_kind
from janus_cluster.observe.planned import load_plan_step_time
from janus_cluster.observe.progress import Progress, load_progress
from janus_cluster.observe.slow import Slow, load_slow
from janus_cluster.run.current import load_current
from janus_cluster.run.next_command import command_for, submit_command
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.attempt import AttemptRecord
from janus_cluster.run.records.submission import RetryRecord, load_submission
from janus_cluster.run.records.verdict import CheckResult, Verdict
from janus_cluster.slurm.pending import Pending, read_reason
from janus_cluster.slurm.state import WAITING, JobState, load_job_states

if TYPE_CHECKING:
    pass

_GATE_EXIT_CODES = (10, 11)
# Classes whose reason is more exact than the class.
_AS_RECORDED = frozenset({"preflight", "preflight_undetermined", "launch", "unknown"})
_MOST_EARLIER = 4
# Of a failed check, as `status --json` has it.
_CHECK_KEYS = ("id", "node", "state", "measured", "expected", "fix")


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """One run: its state, its progress, and the checks that it failed."""

    run: RunDir
    job_id: str | None
    state: JobState
    progress: Progress = field(default_factory=Progress)
    failed_checks: tuple[CheckResult, ...] = ()
    exclude: tuple[str, ...] = ()
    card: FailureCard | None = None
    retry: str | None = None
    # How the attempts before this one ended, the newest last.
    earlier: tuple[str, ...] = ()
    # Which node each rank of the last logged step ran on.
    rank_nodes: Mapping[int, str] = field(default_factory=dict)
    plan_step_time_s: float | None = None
    slow: tuple[Slow, ...] = ()

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def ref(self) -> str:
        """The name by which a user refers to this run."""
        return self.job_id or self.name

    def to_json(self) -> dict[str, Any]:
        """The object of `status JOB --json`: a contract, keys are neither renamed nor removed.

        Units: …_s seconds, …_gb 1e9 bytes. `card` and `plan_step_time_s` are null where they were not requested
        (`list`), and `slow` is empty.
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
            "kind": run_kind(self.run),
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
            "slow": [slow.to_json() for slow in self.slow],
            "earlier": list(self.earlier),
            "failed_checks": [{key: getattr(check, key) for key in _CHECK_KEYS} for check in self.failed_checks],
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


def collect_status(runs: Sequence[RunDir], *, now: float | None = None) -> list[RunStatus]:
    """The state of every run, in order, from one Slurm query for all of them."""
    states = load_job_states(runs, now=time.time() if now is None else now)
    return [load_run_status(run, state) for run, state in zip(runs, states, strict=True)]


def load_run_status(run: RunDir, state: JobState) -> RunStatus:
    """The contents of the run folder of a run in that state."""
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
        if (record := AttemptRecord.load(run.attempt_json(number))) is None:
            continue
        is_over = record.ended_at is not None
        reason = record.reason or (None if is_over else "killed before it recorded a reason")
        if record.failure is not None and record.state == "FAILED" and record.failure.kind not in _AS_RECORDED:
            reason = record.failure.describe()
        parts = (f"attempt {number}, from step {record.from_step}", record.state if is_over else None, reason)
        lines.append(": ".join(part for part in parts if part))
    return tuple(lines)


def _load_retry(run: RunDir) -> str | None:
    """The result of preflight.on_fail as a line; None where it did nothing."""
    record = RetryRecord.load(run.retry_json)
    if record is None:
        return None
    nodes = ", ".join(record.exclude)
    if record.requeued_at is None:
        return f"not tried again without {nodes}: {record.not_retried}"
    return f"queued again without {nodes} after attempt {record.attempt}: {record.reason}"


def add_card(status: RunStatus) -> RunStatus:
    """The same with the card of its failure, read from the run's logs; unchanged for a run without one."""
    return replace(status, card=load_card(status.run, status.state))


def add_slow(status: RunStatus) -> RunStatus:
    """The same with what is slow in its newest attempt."""
    slow = load_slow(status.run, status.state.attempt, status.progress, status.rank_nodes)
    return replace(status, slow=slow)


def add_plan(status: RunStatus) -> RunStatus:
    """The same with the planned seconds a step; unchanged for a run that has logged no step, or no GPU of ours."""
    if status.progress.step_time_s is None:
        return status
    planned_s = load_plan_step_time(status.run, attempt=status.progress.attempt, nodes=status.state.nodes)
    return replace(status, plan_step_time_s=planned_s)


def _load_failed_checks(run: RunDir, state: JobState) -> tuple[tuple[CheckResult, ...], tuple[str, ...]]:
    if state.attempt is None or state.state != "FAILED" or state.exit_code not in _GATE_EXIT_CODES:
        return (), ()
    if (verdict := Verdict.load(run.verdict_json(state.attempt))) is None:
        return (), ()
    return tuple(r for r in verdict.results if r.state in ("FAIL", "ERROR")), verdict.exclude


def next_commands(status: RunStatus) -> list[str]:
    """What to type now; the explanation of a command is a comment behind it."""
    state, run = status.state, status.run
    if state.state == "NOT_SUBMITTED":
        return [submit_by_hand(status.run)]
    if not state.is_final:
        pending = read_reason(state.reason, job_id=status.job_id or "") if state.state in WAITING else Pending("waits")
        if state.state == "COMPLETING":
            # Normal for seconds; minutes mean a process that cannot be killed, or an epilog that hangs.
            return [f"squeue -j {status.job_id} -o '%T %M %R'   # a node is still cleaning up; sinfo -R after minutes"]
        if state.state == "SUSPENDED":
            resume = f"scontrol resume {status.job_id}   # an operator has suspended it: its processes wait"
            return [resume, command_for("tail", run)]
        advice = [f"{pending.command}   # {pending.meaning}"] if pending.command else []
        return advice if pending.outlook == "never" else [*advice, command_for("tail", run)]
    if state.state == "COMPLETED":
        return _after_completion(status)
    if status.card is not None and status.card.next_steps:
        return []
    if not status.failed_checks or state.attempt is None:
        return [command_for("tail", run, "--no-follow -n 100")]
    commands = [f"less {shlex.quote(str(status.run.verdict_md(state.attempt)))}   # every check"]
    if load_current(status.run).value("kind") == "preflight":
        return [
            *commands,
            f"{submit_command(run, 'preflight')}   # when it is mended",
        ]
    # Where every node failed the fault is the job's: there would be nothing left to run on.
    if status.exclude and len(status.exclude) < len(state.nodes):
        without = f"--set slurm.exclude={','.join(status.exclude)}"
        commands.append(f"{command_for('resume', run, without)}   # the same run on other nodes")
    return [*commands, f"{command_for('resume', run)}   # the same run, when it is mended"]


def _after_completion(status: RunStatus) -> list[str]:
    resolved = load_current(status.run)
    again = submit_command(status.run)
    if resolved.value("kind") != "train":
        return [f"{again}   # the same again"]
    commands = [f"{command_for('report', status.run)}   # a page with its pictures"]
    if resolved.value("data.validation_fraction"):
        commands.insert(0, f"{command_for('eval', status.run)}   # actions and text of the held-out episodes")
    if (status.job_id or "").startswith("local-"):
        commands.append(f"janus-cluster sandbox up && {again} --cluster sandbox --follow   # the same on a real Slurm")
    return commands


def submit_by_hand(run: RunDir) -> str:
    """The line that starts a run which was written and never sent."""
    command = "JANUS_LAUNCHER=local bash" if load_current(run).cluster == "local" else "sbatch"
    return f"{command} {shlex.quote(str(run.links.job_sbatch))}"
