"""Where a run was sent, and the state of its newest attempt: submission.json, status.json, retry.json."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from janus_cluster.job.home import sandbox_home
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.base import Record

Cluster = Literal["slurm", "sandbox", "local"]


@dataclass(frozen=True, kw_only=True)
class StatusRecord(Record):
    """status.json: the state of the newest attempt, written by that attempt alone. Units: epoch seconds."""

    cluster: Cluster | None = None
    job_id: str | None = None
    attempt: int | None = None
    state: str
    phase: str | None = None
    nodes: tuple[str, ...] = ()
    exit_code: int | None = None
    signal: int | None = None
    reason: str | None = None
    started_at: float | None = None
    updated_at: float | None = None


@dataclass(frozen=True, kw_only=True)
class Submission(Record):
    """One hand-over of a run to Slurm or to this machine.

    batch_log_bytes: where in the batch log its lines begin, since `resume` appends to what is there.
    attempts_before: the newest attempt of earlier submissions.
    slurm_conf, slurm_cluster: which Slurm has the job ("": the configuration's own cluster); None: the environment's.
    job_id: None where sbatch's answer was lost: the job may be queued.
    cancelled_at: when `janus-cluster cancel` ended it before it began.
    """

    cluster: Cluster
    bundle: int | None = None
    attempts_before: int = 0
    job_id: str | None = None
    command: tuple[str, ...] = ()
    submitted_at: float | None = None
    slurm_conf: Path | None = None
    slurm_cluster: str | None = None
    batch_log_bytes: int = 0
    cancelled_at: float | None = None

    @property
    def script(self) -> Path | None:
        """The script as Slurm knows it, also after the run folder was moved."""
        return Path(self.command[-1]) if self.command and self.cluster != "local" else None

    @property
    def pid(self) -> int | None:
        match = re.fullmatch(r"local-(\d+)", self.job_id or "")
        return int(match.group(1)) if match else None


@dataclass(frozen=True, kw_only=True)
class SubmissionRecord(Submission):
    """submission.json: the newest submission, and those before it, the first one first."""

    history: tuple[Submission, ...] = ()

    def all(self) -> tuple[Submission, ...]:
        """Every submission of the run so far, the first one first."""
        newest = Submission(**{field.name: getattr(self, field.name) for field in fields(Submission)})
        return (*self.history, newest)


@dataclass(frozen=True, kw_only=True)
class RetryRecord(Record):
    """retry.json: the one retry of preflight.on_fail. `requeued_at` is None where Slurm refused: `not_retried`."""

    attempt: int
    exclude: tuple[str, ...]
    reason: str
    requeued_at: float | None = None
    not_retried: str | None = None


def load_status(run: RunDir) -> StatusRecord | None:
    """status.json of the run; None while there is none that can be read."""
    return StatusRecord.load(run.status_json)


def load_submission(run: RunDir) -> Submission | None:
    """Where the run went last: submission.json, or status.json for a script that was submitted by hand later."""
    sent, status = SubmissionRecord.load(run.submission_json), load_status(run)
    if status is None or status.cluster is None:
        return sent
    if sent and (status.job_id in (None, sent.job_id) or (status.started_at or 0.0) < (sent.submitted_at or 0.0)):
        return sent
    conf, cluster = (sent.slurm_conf, sent.slurm_cluster) if sent else (None, None)
    if status.cluster == "sandbox" and conf is None and (shipped := sandbox_home() / "etc" / "slurm.conf").exists():
        conf = shipped
    return Submission(cluster=status.cluster, job_id=status.job_id, slurm_conf=conf, slurm_cluster=cluster)
