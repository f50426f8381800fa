"""`janus-cluster cancel`: ends a run where it runs, and nothing else."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from janus_cluster.errors import JanusError, JobNotFound, UsageError
from janus_cluster.local.process import is_local_job
from janus_cluster.observe.checkpoints import find_newest_checkpoint
from janus_cluster.rundir import RunDir, read_json
from janus_cluster.slurm.commands import Slurm
from janus_cluster.slurm.recorded import load_status, load_submission
from janus_cluster.slurm.state import NOBODY, RUNNING, load_job_states

# checkpoint.confirm_cancel_min of a run that an older version made.
DEFAULT_ALLOWED_MIN = 10.0


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What a cancelled run would lose. Units: minutes of work since the last complete checkpoint, or the start."""

    minutes: float
    since: str
    allowed_min: float

    @property
    def is_much(self) -> bool:
        return self.minutes > self.allowed_min


def estimate_loss(run: RunDir, *, now: float) -> Loss:
    """The work that would be lost if the run ended now; 0 minutes for a run that has not begun or is over."""
    state = load_job_states([run])[0]
    status, found = load_status(run), find_newest_checkpoint(run)
    allowed_min = _allowed_min(run)
    if state.state not in RUNNING or status is None or status.started_at is None:
        return Loss(minutes=0.0, since="the start", allowed_min=allowed_min)
    since = f"the start of attempt {status.attempt}"
    begun = status.started_at
    if found is not None and found.completed_at > begun:
        since, begun = f"checkpoint-{found.step}", found.completed_at
    return Loss(minutes=max(0.0, (now - begun) / 60), since=since, allowed_min=allowed_min)


def _allowed_min(run: RunDir) -> float:
    try:
        return float(read_json(run.resolved_json)["job"]["checkpoint"]["confirm_cancel_min"])
    except (OSError, ValueError, KeyError, TypeError):
        return DEFAULT_ALLOWED_MIN


def cancel_run(run: RunDir) -> str:
    """The run has been asked to end. Returns: what was done, for the user.

    Raises: UsageError when there is nothing to end, JobNotFound when Slurm has no such job, SlurmUnavailable.
    """
    sent = load_submission(run)
    state = load_job_states([run])[0]
    if sent is None or sent.job_id is None:
        raise UsageError(f"{run.name} was not submitted: there is nothing to cancel")
    if state.is_final:
        reason = f" ({state.reason})" if state.reason else ""
        raise UsageError(f"job {sent.job_id} is not running: it is {state.state}{reason}, says {state.source}")
    if sent.pid is not None:
        return _cancel_local(run, sent.pid)
    if state.state == "UNKNOWN" and state.source != NOBODY:
        raise JobNotFound(f"Slurm knows no job {sent.job_id}", hint="janus-cluster list shows the runs")
    # Slurm's own words tell when it cannot be reached.
    Slurm(conf=sent.slurm_conf).scancel(sent.job_id)
    return f"job {sent.job_id} ({run.name}) was cancelled; it had been {state.state}"


def _cancel_local(run: RunDir, pid: int) -> str:
    # Asked again right before the signal: a pid can have passed to another process since.
    if not is_local_job(pid, run):
        raise JobNotFound(f"process {pid} is no longer run {run.name}", hint=f"janus-cluster status {run.name}")
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
