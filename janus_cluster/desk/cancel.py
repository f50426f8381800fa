"""`janus-cluster cancel`: ends a run under Slurm or on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass, replace

from janus_cluster.desk.send import run_locked
from janus_cluster.desk.settle import is_unsettled, settle_submission
from janus_cluster.errors import JanusError, JobNotFound, SlurmUnavailable, UsageError
from janus_cluster.run.checkpoints import find_newest_checkpoint
from janus_cluster.run.current import load_current
from janus_cluster.run.local_process import is_local_job
from janus_cluster.run.next_command import command_for
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.submission import SubmissionRecord, load_status, load_submission
from janus_cluster.slurm.state import NO_SOURCE, RUNNING, WAITING, JobState, load_job_states, slurm_of

# checkpoint.confirm_cancel_min of a run that an older version made.
DEFAULT_ALLOWED_MIN = 10.0
# A user waits for it; a controller that is only busy answers in less.
_ASK_SLURM_S = 10.0


@dataclass(frozen=True, kw_only=True)
class LostWork:
    """Work that a cancelled run would lose. Units: minutes since the last complete checkpoint, or the start."""

    minutes: float
    since: str
    allowed_min: float

    @property
    def is_much(self) -> bool:
        return self.minutes > self.allowed_min


def estimate_loss(run: RunDir, *, now: float) -> LostWork:
    """The work that would be lost if the run ended now; 0 minutes for a run that has not begun or is over."""
    state = _load_state(run)
    status, found = load_status(run), find_newest_checkpoint(run)
    allowed_min = _allowed_min(run)
    sent = load_submission(run)
    # Of a job that was sent again, and has not begun to write, status.json is the one before's.
    is_own = status is not None and sent is not None and status.job_id in (None, sent.job_id)
    if state.state not in RUNNING or status is None or status.started_at is None or not is_own:
        return LostWork(minutes=0.0, since="the start", allowed_min=allowed_min)
    since = f"the start of attempt {status.attempt}"
    begun = status.started_at
    if found is not None and found.completed_at > begun:
        since, begun = f"checkpoint-{found.step}", found.completed_at
    return LostWork(minutes=max(0.0, (now - begun) / 60), since=since, allowed_min=allowed_min)


def _allowed_min(run: RunDir) -> float:
    allowed_min = load_current(run).value("checkpoint.confirm_cancel_min")
    return float(allowed_min) if isinstance(allowed_min, (int, float)) else DEFAULT_ALLOWED_MIN


def cancel_run(run: RunDir) -> str:
    """Ask the run to end. Returns: what was done, for the user.

    Raises: UsageError when there is nothing to end, JobNotFound when Slurm has no such job, SlurmUnavailable.
    """
    if is_unsettled(run):
        with run_locked(run):
            settle_submission(run)
    sent = load_submission(run)
    state = _load_state(run)
    if sent is None or sent.job_id is None:
        raise UsageError(f"{run.name} was not submitted: there is nothing to cancel")
    if state.is_final:
        reason = f" ({state.reason})" if state.reason else ""
        raise UsageError(f"job {sent.job_id} is not running: it is {state.state}{reason}, source: {state.source}")
    if sent.pid is not None:
        return _cancel_local(run, sent.pid)
    if state.state == "UNKNOWN" and state.source != NO_SOURCE:
        raise JobNotFound(f"Slurm knows no job {sent.job_id}", hint="janus-cluster list shows the runs")
    slurm_of(sent, timeout_s=_ASK_SLURM_S).scancel(sent.job_id)
    if state.state in WAITING:
        _record_cancelled(run, sent.job_id)
    return f"job {sent.job_id} ({run.name}) was cancelled; it had been {state.state}"


def _record_cancelled(run: RunDir, job_id: str) -> None:
    """Slurm forgets a job within minutes, and one that never began writes no status."""
    record = SubmissionRecord.load(run.submission_json)
    if record is not None and record.job_id == job_id:
        with contextlib.suppress(OSError):
            replace(record, cancelled_at=time.time()).write(run.submission_json, mode=0o600)


def _load_state(run: RunDir) -> JobState:
    """The run's state. Raises: SlurmUnavailable where its Slurm does not answer, which scancel would not, either."""
    state = load_job_states([run], timeout_s=_ASK_SLURM_S)[0]
    if state.is_unanswered:
        sent = load_submission(run)
        reason = (state.reason or "").removeprefix("not confirmed: ")
        raise SlurmUnavailable(
            f"job {sent.job_id if sent else run.name} was not cancelled, and may run on. {reason}",
            hint="scontrol ping   # the same line once the controller answers",
        )
    return state


def _cancel_local(run: RunDir, pid: int) -> str:
    # Checked again right before the signal: a pid can have passed to another process since.
    if not is_local_job(pid, run):
        raise JobNotFound(f"process {pid} is no longer run {run.name}", hint=command_for("status", run))
    try:
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGTERM)
        else:
            os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        raise JobNotFound(f"process {pid} of run {run.name} has just ended") from None
    except PermissionError:
        raise JanusError(f"process {pid} of run {run.name} belongs to another user") from None
    return f"run {run.name} (process {pid}) was sent SIGTERM"
