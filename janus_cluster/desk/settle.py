"""A submission whose answer from sbatch was lost becomes a known job, or none, before anything else is done with it."""

from __future__ import annotations

from dataclasses import fields, replace

from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.submission import Submission, SubmissionRecord
from janus_cluster.slurm.state import slurm_of


def is_unsettled(run: RunDir) -> bool:
    """Whether the run's newest submission has no job id, because sbatch's answer was lost."""
    sent = SubmissionRecord.load(run.submission_json)
    return sent is not None and sent.cluster != "local" and sent.job_id is None


def settle_submission(run: RunDir) -> None:
    """Search the queue for the job of a submission without a job id, and record what was found. Hold the run's lock.

    A submission that the queue does not have is taken out of submission.json again.
    Raises: SlurmUnavailable, JanusError where the queue cannot be searched: then nothing is changed.
    """
    sent = SubmissionRecord.load(run.submission_json)
    if sent is None or not is_unsettled(run):
        return
    script = sent.script or run.bundle(sent.bundle or 1).job_sbatch
    job = slurm_of(sent).find_job(script, earlier={s.job_id for s in sent.history if s.job_id})
    if job is not None:
        replace(sent, job_id=job.job_id).write(run.submission_json, mode=0o600)
    elif sent.history:
        *before, last = sent.history
        values = {field.name: getattr(last, field.name) for field in fields(Submission)}
        SubmissionRecord(**values, history=tuple(before)).write(run.submission_json, mode=0o600)
    else:
        run.submission_json.unlink()
