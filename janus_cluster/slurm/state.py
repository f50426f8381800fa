"""The state of a job, from status.json, then squeue, scontrol show job, sacct.

Each answer names its source and age. The rules:
  - A final status.json is the job's own record; only a Slurm that has queued or started the job again since overrides
  it.
  - A status.json with RUNNING counts only while Slurm (or the local process) confirms it.
  - Slurm is asked before status.json is read: a job that Slurm reports as ended has written its last record by then.
  - What no source knows is UNKNOWN, and UNKNOWN is never success.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from janus_cluster.errors import JanusError, SlurmUnavailable
from janus_cluster.run.local_process import is_local_job
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.failure import ScriptFailure
from janus_cluster.run.records.submission import StatusRecord, Submission, load_status, load_submission
from janus_cluster.slurm.commands import Slurm, SlurmJob

# Which Slurm (its slurm.conf and cluster), and the job's number there.
JobKey = tuple[Path | None, str | None, str]
# The source of a state where none could be queried.
NO_SOURCE = "none"
FINAL_STATUS = frozenset({"COMPLETED", "FAILED", "STOPPED", "CANCELLED"})
# Preemption and requeue also send a stop signal: only Slurm knows, a moment later, whether the job is queued again.
MAY_BEGIN_AGAIN = frozenset({"STOPPED", "CANCELLED"})
WAITING = frozenset({
    "PENDING", "CONFIGURING", "POWER_UP_NODE", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "EXPEDITING",
    "RESV_DEL_HOLD", "SPECIAL_EXIT",
})  # fmt: skip
RUNNING = frozenset({"RUNNING", "COMPLETING", "SUSPENDED", "RESIZING", "SIGNALING", "STAGE_OUT"})
ENDED_BADLY = {
    "FAILED": "the job script failed",
    "CANCELLED": "cancelled",
    "TIMEOUT": "the walltime was used up",
    "NODE_FAIL": "a node failed",
    "OUT_OF_MEMORY": "the node's memory ran out and a process was killed",
    "PREEMPTED": "preempted by a job of higher priority, and not requeued",
    "DEADLINE": "it could not end before its deadline",
    "BOOT_FAIL": "a node could not be booted",
    "REVOKED": "revoked: another cluster of the federation took it",
    "LAUNCH_FAILED": "the job could not be launched",
    "RECONFIG_FAIL": "a node could not be reconfigured",
}
FINAL = FINAL_STATUS | set(ENDED_BADLY)
# Slurm calls a job under SIGSTOP STOPPED; we, one that stopped on purpose.
_SLURM_ALIASES = {"STOPPED": "SUSPENDED"}
# A job number starts again at 1 with a new sandbox: a first run of that number queued later than this is another job.
_SUBMIT_SLACK_S = 600.0
# A Slurm on this machine answers in milliseconds; one that was taken down would be waited for 18 s.
_SANDBOX_TIMEOUT_S = 8.0
# A status.json younger than four heartbeats is evidence of life that no absence from a queue overrules.
_FRESH_S = 60.0
_NO_JOB_ID = "sbatch's answer was lost, so the job may be queued; resume and cancel search for it"
STOPPED_EXIT_CODE = 13


@dataclass(frozen=True, kw_only=True)
class JobState:
    """One run's state, its source, and the source's age.

    Units: age_s seconds. exit_code is the job's own, 128 + n where signal n ended it; None where it is unknown.
    """

    state: str
    source: str
    age_s: float | None = None
    exit_code: int | None = None
    reason: str | None = None
    nodes: tuple[str, ...] = ()
    attempt: int | None = None
    # Of a waiting job, as Slurm expects it; epoch seconds.
    starts_at: float | None = None
    # Slurm was asked and could not be reached.
    is_unanswered: bool = False

    @property
    def is_final(self) -> bool:
        return self.state in FINAL

    @property
    def command_exit_code(self) -> int:
        """What a command that followed the job exits with: 0 only for COMPLETED, never 0 for an unknown end."""
        if self.state == "COMPLETED":
            return self.exit_code or 0
        if self.exit_code:
            return self.exit_code
        return STOPPED_EXIT_CODE if self.state == "STOPPED" else 1


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Slurm's answer on a job: the job, None for one it does not know, or why it could not be asked."""

    job: SlurmJob | None = None
    problem: str | None = None
    is_unanswered: bool = False


def load_job_states(
    runs: Sequence[RunDir], *, now: float | None = None, timeout_s: float | None = None
) -> list[JobState]:
    """The state of every run, in order, from one squeue for all the jobs of each Slurm.

    `timeout_s`: of each program, where its answer is not worth waiting for longer.
    """
    sent = [load_submission(run) for run in runs]
    pairs = list(zip(runs, sent, strict=True))
    asked = [(run, s) for run, s in pairs if s and s.cluster != "local" and not _has_completed(run, s)]
    moment = time.time() if now is None else now
    answers = _query_all((s for _, s in asked), timeout_s=timeout_s)
    return [_state_of(run, s, answers, moment) for run, s in pairs]


def _has_completed(run: RunDir, submission: Submission) -> bool:
    # Slurm need not be asked: if such a job were started again, its status.json would not be COMPLETED.
    status = _own_status(load_status(run), submission)
    return status is not None and status.state == "COMPLETED"


def _state_of(run: RunDir, submission: Submission | None, answers: Mapping[JobKey, Answer], now: float) -> JobState:
    if submission is None:
        return JobState(state="NOT_SUBMITTED", source="run folder", reason=f"sbatch {run.links.job_sbatch} submits it")
    if submission.cluster == "local":
        alive = submission.pid is not None and is_local_job(submission.pid, run)
        return judge_local_state(_own_status(load_status(run), submission), alive=alive, now=now)
    answer = answers.get(_key(submission), Answer(problem="Slurm was not asked"))
    if answer.job and not is_same_job(answer.job, run, submission):
        answer = Answer()
    state = judge_slurm_state(_own_status(load_status(run), submission), answer, now=now)
    if state.state == "UNKNOWN" and (ended := _ended_by_script(run, submission)) is not None:
        return ended
    if submission.cancelled_at is not None and state.state == "UNKNOWN" and not state.is_unanswered:
        reason = "cancelled before it began"
        return JobState(
            state="CANCELLED", source=run.submission_json.name, age_s=now - submission.cancelled_at, reason=reason
        )
    return state


def _ended_by_script(run: RunDir, submission: Submission) -> JobState | None:
    """How job.sbatch of this job ended before the attempt began; None where it did not."""
    failure = ScriptFailure.load(run.script_failure_json)
    if failure is None or failure.job_id != submission.job_id:
        return None
    return JobState(
        state="FAILED", source=run.script_failure_json.name, exit_code=2, reason=failure.message, nodes=(failure.node,)
    )


def judge_slurm_state(status: StatusRecord | None, answer: Answer, *, now: float) -> JobState:
    """The state of a job under Slurm, from its own last record and Slurm's."""
    job = answer.job
    if job is not None and job.state in _SLURM_ALIASES:
        job = replace(job, state=_SLURM_ALIASES[job.state])
    if status is not None and status.state in FINAL_STATUS:
        if job and _began_again(job, status):
            return _from_slurm(job, status)
        if job and job.state in RUNNING and status.state in MAY_BEGIN_AGAIN:
            return replace(_from_status(status, now), state="COMPLETING", source=job.source, exit_code=None)
        return _from_status(status, now)
    if answer.problem is not None:
        return replace(_unconfirmed(status, answer.problem, now), is_unanswered=answer.is_unanswered)
    if job is None:
        return _forgotten(status, now)
    if job.state == "RUNNING" and status is not None and not _began_again(job, status):
        return _from_status(status, now)
    if job.state == "COMPLETED" and status is not None:
        reason = f"{job.source} has COMPLETED, but status.json stopped at {status.state}: the job did not see its end"
        return replace(_from_slurm(job, status), state="UNKNOWN", reason=reason, exit_code=None)
    return _from_slurm(job, status)


def judge_local_state(status: StatusRecord | None, *, alive: bool, now: float) -> JobState:
    """The state of a job on this machine, from its own last record and whether its process is alive."""
    if status is not None and (status.state in FINAL_STATUS or alive):
        return _from_status(status, now)
    if alive:
        return JobState(state="RUNNING", source="process", age_s=0.0, reason="starting")
    last = f"status.json stopped at {status.state}" if status else "it wrote no status.json"
    return JobState(
        state="FAILED",
        source="process",
        age_s=0.0,
        reason=f"ended without a reason: its process is gone and {last}; see logs/batch.log",
        nodes=status.nodes if status else (),
        attempt=status.attempt if status else None,
    )


def is_same_job(job: SlurmJob, run: RunDir, submission: Submission) -> bool:
    """Whether Slurm's job is this run's, and not another one that got the same number from a newer Slurm."""
    # Of any bundle, or through the link at the top.
    script = re.match(rf"(/.*?/{re.escape(run.links.job_sbatch.name)})(?: |$)", job.command or "")
    named = Path(script.group(1)) if script else None
    # A folder that was moved keeps its job; a job that was submitted by hand may name it by a link.
    if named not in (None, submission.script) and run.path.resolve() not in named.resolve().parents:
        return False
    if job.submit_time is None or submission.submitted_at is None:
        return True
    if job.submit_time < submission.submitted_at - _SUBMIT_SLACK_S:
        return False
    return job.restarts != 0 or job.submit_time < submission.submitted_at + _SUBMIT_SLACK_S


def slurm_of(submission: Submission, *, timeout_s: float | None = None) -> Slurm:
    """The Slurm that has the job, whatever this shell's environment names."""
    slurm = Slurm(conf=submission.slurm_conf, cluster=submission.slurm_cluster)
    limits = [slurm.timeout_s, *([_SANDBOX_TIMEOUT_S] if submission.cluster == "sandbox" else [])]
    return replace(slurm, timeout_s=min([*limits, *([timeout_s] if timeout_s is not None else [])]))


def _query_all(wanted: Iterable[Submission], *, timeout_s: float | None) -> dict[JobKey, Answer]:
    """Every Slurm's answers on its jobs."""
    by_slurm: dict[tuple[Path | None, str | None], list[Submission]] = {}
    for submission in wanted:
        by_slurm.setdefault(_key(submission)[:2], []).append(submission)
    answers: dict[JobKey, Answer] = {}
    for slurm, sent in by_slurm.items():
        found = _query(slurm_of(sent[0], timeout_s=timeout_s), [key for s in sent if (key := _key(s)[2])])
        answers |= {(*slurm, job_id): answer for job_id, answer in found.items()}
        answers[(*slurm, "")] = Answer(
            problem="sbatch's answer was lost, so the job may be queued: resume and cancel look"
        )
    return answers


def _query(slurm: Slurm, job_ids: Sequence[str]) -> dict[str, Answer]:
    problem, is_unanswered = None, False
    found: dict[str, SlurmJob] = {}
    try:
        found |= slurm.squeue(job_ids)
        # A hidden partition or a site's privacy rule can keep a job out of squeue alone.
        for job_id in job_ids:
            if job_id not in found and (job := slurm.scontrol_show_job(job_id)):
                found[job_id] = job
    except JanusError as e:
        problem, is_unanswered = e.message, isinstance(e, SlurmUnavailable)
    try:
        recorded = slurm.sacct([job_id for job_id in job_ids if job_id not in found])
    except JanusError:
        # Many sites keep no accounting, or its database is down: the sources above have answered already.
        recorded = {}
    # Accounting keeps open rows of jobs that were lost with a controller; only an end that it recorded counts.
    found |= {i: job for i, job in recorded.items() if job.state == "COMPLETED" or job.state in ENDED_BADLY}
    unknown = Answer(problem=problem, is_unanswered=is_unanswered)
    return {i: Answer(job=found[i]) if i in found else unknown for i in job_ids}


def _key(submission: Submission) -> JobKey:
    known = submission.job_id is not None and submission.job_id.isdigit()
    return submission.slurm_conf, submission.slurm_cluster, str(submission.job_id) if known else ""


def _own_status(status: StatusRecord | None, submission: Submission) -> StatusRecord | None:
    """The status file, unless an earlier job of the same run folder wrote it."""
    if status is None or status.job_id in (None, submission.job_id):
        return status
    return None


def _began_again(job: SlurmJob, status: StatusRecord) -> bool:
    if job.state in WAITING:
        return True
    if job.state not in RUNNING or job.state == "COMPLETING":
        return False
    return job.start_time is not None and status.updated_at is not None and job.start_time > status.updated_at


def _from_status(status: StatusRecord, now: float) -> JobState:
    exit_code = status.exit_code
    if exit_code is None and status.signal:
        exit_code = 128 + status.signal
    return JobState(
        state=status.state if status.state in FINAL_STATUS | {"RUNNING"} else "UNKNOWN",
        source="status.json",
        age_s=_age(status, now),
        exit_code=exit_code,
        reason=status.reason,
        nodes=status.nodes,
        attempt=status.attempt,
    )


def _from_slurm(job: SlurmJob, status: StatusRecord | None) -> JobState:
    known = job.state in WAITING or job.state in RUNNING or job.state in FINAL
    is_end = job.state in FINAL
    began_again = status is not None and _began_again(job, status)
    return JobState(
        state=job.state if known else "UNKNOWN",
        source=job.source,
        age_s=0.0,
        exit_code=_exit_code(job) if is_end else None,
        reason=_reason(job) if known else f"{job.source} has {job.state}",
        nodes=status.nodes if status and status.nodes and not began_again else job.nodes,
        attempt=status.attempt if status else None,
        starts_at=job.start_time if job.state in WAITING else None,
    )


def _exit_code(job: SlurmJob) -> int | None:
    if job.state == "COMPLETED":
        return job.exit_code
    # For other ends the numbers are Slurm's own bookkeeping: 1 for DEADLINE, 15 for NODE_FAIL, 125 for memory.
    if job.state not in ("FAILED", "CANCELLED"):
        return None
    return job.exit_code or (128 + job.signal if job.signal else None)


def _reason(job: SlurmJob) -> str | None:
    if job.state not in ENDED_BADLY:
        return job.reason
    meaning = ENDED_BADLY[job.state]
    if job.state == "CANCELLED":
        # Squeue still shows why it was waiting when it was cancelled.
        return job.reason if job.reason and job.reason.startswith("cancelled by") else meaning
    return f"{meaning} (Slurm: {job.reason})" if job.reason else meaning


def _unconfirmed(status: StatusRecord | None, problem: str, now: float) -> JobState:
    if status is None:
        return JobState(state="UNKNOWN", source=NO_SOURCE, reason=problem)
    return replace(_from_status(status, now), reason=f"not confirmed: {problem}")


def _forgotten(status: StatusRecord | None, now: float) -> JobState:
    if status is None:
        return JobState(state="UNKNOWN", source="squeue", reason="Slurm knows no such job, and it wrote no status.json")
    if status.updated_at is not None and now - status.updated_at < _FRESH_S and status.state not in FINAL_STATUS:
        return _unconfirmed(status, "Slurm knows no such job, but status.json was written a moment ago", now)
    reason = f"ended without a reason: Slurm no longer knows the job, and status.json stopped at {status.state}"
    return replace(_from_status(status, now), state="FAILED", source="squeue", age_s=0.0, reason=reason)


def _age(status: StatusRecord, now: float) -> float | None:
    return None if status.updated_at is None else round(max(0.0, now - status.updated_at), 1)
