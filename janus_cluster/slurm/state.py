"""The state ladder: the job's own status.json, then squeue, scontrol show job, sacct.

One answer per run, saying which rung gave it and how old it is. The rules, in one place:
  - A final status.json is the job's own word; it yields only to a Slurm that has the job queued or started again since.
  - A status.json that says RUNNING is believed only while Slurm (or the local process) says so too.
  - Slurm is asked before status.json is read: a job that Slurm calls dead has written its last word by then.
  - What no rung knows is UNKNOWN, and UNKNOWN is never success.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from janus_cluster.errors import JanusError
from janus_cluster.local.process import is_local_job
from janus_cluster.rundir import RunDir
from janus_cluster.slurm.commands import Slurm, SlurmJob
from janus_cluster.slurm.kept import LONGEST_TURN_S, Kept, lately_wanted, load_kept, name_answer, one_asks, write_kept
from janus_cluster.slurm.recorded import StatusFile, Submission, load_status, load_submission

# Which Slurm, and the job's number there.
JobKey = tuple[Path | None, str]
# The source of a state that could not be asked for.
NOBODY = "none"
FINAL_STATUS = frozenset({"COMPLETED", "FAILED", "STOPPED", "CANCELLED"})
# A stop signal also comes with preemption and requeue: only Slurm knows, a moment later, whether the job comes back.
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
# STOPPED is Slurm's word for a job under SIGSTOP and ours for one that stopped on purpose.
_SLURM_ALIASES = {"STOPPED": "SUSPENDED"}
# A job number starts again at 1 with a new sandbox: a first run of that number queued later than this is another job.
_SUBMIT_SLACK_S = 600.0
# A Slurm on this machine answers in milliseconds; one that was taken down would be waited for 18 s.
_SANDBOX_TIMEOUT_S = 8.0
STOPPED_EXIT_CODE = 13


@dataclass(frozen=True, kw_only=True)
class JobState:
    """One run's state, who said so, and how old the word is.

    Units: age_s seconds; slurm_age_s those since Slurm was asked, where status.json was held against a kept answer.
    exit_code is the job's own, 128 + n where signal n ended it; None where nobody knows.
    """

    state: str
    source: str
    age_s: float | None = None
    exit_code: int | None = None
    reason: str | None = None
    nodes: tuple[str, ...] = ()
    attempt: int | None = None
    slurm_age_s: float | None = None
    # Of a waiting job, as Slurm expects it; epoch seconds.
    starts_at: float | None = None

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
    """What Slurm said of a job: the job, None for one it does not know, or why it could not be asked.

    Units: age_s seconds since it was asked; 0 for an answer of this moment.
    """

    job: SlurmJob | None = None
    problem: str | None = None
    age_s: float = 0.0


def load_job_states(runs: Sequence[RunDir], *, now: float | None = None, max_age_s: float = 0.0) -> list[JobState]:
    """The state of every run, in order, from one squeue for all the jobs of each Slurm.

    With `max_age_s` a site's Slurm is asked, for all of them, only where what it said to this user is older than that
    (slurm/kept.py): for a reader, never for a command that acts.
    """
    sent = [load_submission(run) for run in runs]
    pairs = list(zip(runs, sent, strict=True))
    asked = [(run, s) for run, s in pairs if s and s.cluster != "local" and not _has_completed(run, s)]
    moment = time.time() if now is None else now
    answers = _look_up(asked, moment, max_age_s) if max_age_s > 0 else _ask_slurm(_key(s) for _, s in asked)
    return [_state_of(run, s, answers, moment) for run, s in pairs]


def _look_up(asked: Sequence[tuple[RunDir, Submission]], now: float, max_age_s: float) -> dict[JobKey, Answer]:
    """What is kept, if that answers for every job, else what Slurm says now, which is kept.

    The sandbox's controller serves nobody else, and jobs of a rehearsal begin and end within seconds: it is asked.
    """
    of_site = [(run, s) for run, s in asked if s.cluster != "sandbox" and _key(s)[1]]
    answers = _ask_slurm(_key(s) for _, s in asked if s.cluster == "sandbox" or not _key(s)[1])
    # Read before Slurm is asked: where it changes meanwhile, the answer is not used again.
    words = {_key(s): _own_word(run, s) for run, s in of_site}
    sent = [s for _, s in of_site]
    found = _all_kept(sent, words, now, max_age_s)
    if found is None:
        with one_asks():
            # Another one may have asked while this one waited.
            found = _all_kept(sent, words, now, max_age_s)
            if found is None:
                return answers | _ask_and_keep(words, now)
    unnoticed = {
        name_answer(*key): replace(k, wanted_at=now) for key, k in found.items() if now - k.wanted_at > max_age_s
    }
    if unnoticed:
        write_kept(unnoticed, now=now)
    return answers | {key: Answer(job=k.job, age_s=round(max(0.0, now - k.asked_at), 1)) for key, k in found.items()}


def _ask_and_keep(words: Mapping[JobKey, str | None], now: float) -> dict[JobKey, Answer]:
    """What Slurm says of these jobs, asked together with those that others look at; all of it is kept."""
    beside = {
        (conf, job_id): kept
        for conf in {conf for conf, _ in words}
        for job_id, kept in lately_wanted(conf, now=now).items()
        if (conf, job_id) not in words
    }
    fresh = _ask_slurm(words, beside=beside)
    new = {
        name_answer(*key): replace(beside[key], asked_at=now, job=answer.job)
        if key in beside
        else Kept(asked_at=now, wanted_at=now, word=words[key], job=answer.job)
        for key, answer in fresh.items()
        if answer.problem is None
    }
    if new:
        write_kept(new, now=now)
    return {key: answer for key, answer in fresh.items() if key in words}


def _all_kept(
    sent: Sequence[Submission], words: Mapping[JobKey, str | None], now: float, max_age_s: float
) -> dict[JobKey, Kept] | None:
    """The kept answers for all of the jobs; None where one of them has none that may be used."""
    kept = load_kept() if sent else {}
    found = {_key(s): _usable(kept.get(name_answer(*_key(s))), s, words[_key(s)], now, max_age_s) for s in sent}
    usable = {key: k for key, k in found.items() if k}
    return usable if len(usable) == len(found) else None


def _usable(kept: Kept | None, submission: Submission, word: str | None, now: float, max_age_s: float) -> Kept | None:
    # Who waited for another one's question finds an answer of a moment later than its own beginning.
    if kept is None or not -LONGEST_TURN_S <= now - kept.asked_at < max_age_s or kept.word != word:
        return None
    # A job that was sent since may have the number of an older Slurm's.
    return kept if kept.asked_at >= (submission.submitted_at or 0.0) else None


def _own_word(run: RunDir, submission: Submission) -> str | None:
    status = _own_status(load_status(run), submission)
    return None if status is None else f"{status.state}/{status.attempt}"


def _has_completed(run: RunDir, submission: Submission) -> bool:
    # Slurm is spared the question: were such a job ever started again, its status.json would say so.
    status = _own_status(load_status(run), submission)
    return status is not None and status.state == "COMPLETED"


def _state_of(run: RunDir, submission: Submission | None, answers: Mapping[JobKey, Answer], now: float) -> JobState:
    if submission is None:
        return JobState(state="NOT_SUBMITTED", source="run folder", reason=f"sbatch {run.job_sbatch} submits it")
    if submission.cluster == "local":
        alive = submission.pid is not None and is_local_job(submission.pid, run)
        return judge_local_state(_own_status(load_status(run), submission), alive=alive, now=now)
    answer = answers.get(_key(submission), Answer(problem="Slurm was not asked"))
    if answer.job and not is_same_job(answer.job, run, submission):
        answer = Answer()
    return judge_slurm_state(_own_status(load_status(run), submission), answer, now=now)


def judge_slurm_state(status: StatusFile | None, answer: Answer, *, now: float) -> JobState:
    """The state of a job under Slurm, from its own last word and Slurm's."""
    state = _judge(status, answer, now)
    if not answer.age_s:
        return state
    if state.source != "status.json":
        return replace(state, age_s=answer.age_s)
    return state if state.is_final else replace(state, slurm_age_s=answer.age_s)


def _judge(status: StatusFile | None, answer: Answer, now: float) -> JobState:
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
        return _unconfirmed(status, answer.problem, now)
    if job is None:
        return _forgotten(status, now)
    if job.state == "RUNNING" and status is not None and not _began_again(job, status):
        return _from_status(status, now)
    if job.state == "COMPLETED" and status is not None:
        reason = f"{job.source} says COMPLETED, but status.json stopped at {status.state}: the job did not see its end"
        return replace(_from_slurm(job, status), state="UNKNOWN", reason=reason, exit_code=None)
    return _from_slurm(job, status)


def judge_local_state(status: StatusFile | None, *, alive: bool, now: float) -> JobState:
    """The state of a job on this machine, from its own last word and whether its process lives."""
    if status is not None and (status.state in FINAL_STATUS or alive):
        return _from_status(status, now)
    if alive:
        return JobState(state="RUNNING", source="process", age_s=0.0, reason="starting")
    said = f"status.json stopped at {status.state}" if status else "it wrote no status.json"
    return JobState(
        state="FAILED",
        source="process",
        age_s=0.0,
        reason=f"ended without saying why: its process is gone and {said}; see logs/batch.log",
        nodes=status.nodes if status else (),
        attempt=status.attempt if status else None,
    )


def is_same_job(job: SlurmJob, run: RunDir, submission: Submission) -> bool:
    """Whether Slurm's job is this run's, and not another one that got the same number from a newer Slurm."""
    script = re.match(rf"(/.*?/{re.escape(run.job_sbatch.name)})(?: |$)", job.command or "")
    if script and Path(script.group(1)).resolve() != run.job_sbatch.resolve():
        return False
    if job.submit_time is None or submission.submitted_at is None:
        return True
    if job.submit_time < submission.submitted_at - _SUBMIT_SLACK_S:
        return False
    return job.restarts != 0 or job.submit_time < submission.submitted_at + _SUBMIT_SLACK_S


def _ask_slurm(wanted: Iterable[JobKey], *, beside: Iterable[JobKey] = ()) -> dict[JobKey, Answer]:
    """What every Slurm says of its jobs; of those named `beside` them only what the same questions bring."""
    answers: dict[JobKey, Answer] = {}
    ids_by_conf: dict[Path | None, list[str]] = {}
    for conf, job_id in wanted:
        ids_by_conf.setdefault(conf, []).extend([job_id] if job_id else [])
    for conf, job_ids in ids_by_conf.items():
        slurm = Slurm() if conf is None else Slurm(conf=conf, timeout_s=_SANDBOX_TIMEOUT_S)
        found = _climb(slurm, job_ids, [job_id for own, job_id in beside if own == conf])
        answers |= {(conf, job_id): answer for job_id, answer in found.items()}
        answers[(conf, "")] = Answer(problem="no job id is known")
    return answers


def _climb(slurm: Slurm, job_ids: Sequence[str], beside: Sequence[str]) -> dict[str, Answer]:
    problem = None
    found: dict[str, SlurmJob] = {}
    try:
        found |= slurm.squeue([*job_ids, *beside])
        # A hidden partition or a site's privacy rule can keep a job out of squeue alone.
        if len(job_ids) == 1 and job_ids[0] not in found and (job := slurm.scontrol_show_job(job_ids[0])):
            found[job.job_id] = job
    except JanusError as e:
        problem = e.message
    try:
        recorded = slurm.sacct([job_id for job_id in job_ids if job_id not in found])
    except JanusError:
        # Many sites keep no accounting, or its database is away: the rungs above have spoken already.
        recorded = {}
    # Accounting keeps open rows of jobs that were lost with a controller; only an end that it recorded counts.
    found |= {i: job for i, job in recorded.items() if job.state == "COMPLETED" or job.state in ENDED_BADLY}
    answers = {i: Answer(job=found[i]) if i in found else Answer(problem=problem) for i in job_ids}
    return answers | {i: Answer(job=found[i]) for i in beside if i in found}


def _key(submission: Submission) -> JobKey:
    known = submission.job_id is not None and submission.job_id.isdigit()
    return submission.slurm_conf, str(submission.job_id) if known else ""


def _own_status(status: StatusFile | None, submission: Submission) -> StatusFile | None:
    """The status file, unless an earlier job of the same run folder wrote it."""
    if status is None or status.job_id in (None, submission.job_id):
        return status
    return None


def _began_again(job: SlurmJob, status: StatusFile) -> bool:
    if job.state in WAITING:
        return True
    if job.state not in RUNNING or job.state == "COMPLETING":
        return False
    return job.start_time is not None and status.updated_at is not None and job.start_time > status.updated_at


def _from_status(status: StatusFile, now: float) -> JobState:
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


def _from_slurm(job: SlurmJob, status: StatusFile | None) -> JobState:
    known = job.state in WAITING or job.state in RUNNING or job.state in FINAL
    is_end = job.state in FINAL
    began_again = status is not None and _began_again(job, status)
    return JobState(
        state=job.state if known else "UNKNOWN",
        source=job.source,
        age_s=0.0,
        exit_code=_exit_code(job) if is_end else None,
        reason=_reason(job) if known else f"{job.source} says {job.state}",
        nodes=status.nodes if status and status.nodes and not began_again else job.nodes,
        attempt=status.attempt if status else None,
        starts_at=job.start_time if job.state in WAITING else None,
    )


def _exit_code(job: SlurmJob) -> int | None:
    if job.state == "COMPLETED":
        return job.exit_code
    # For other ends the numbers are Slurm's own book-keeping: 1 for DEADLINE, 15 for NODE_FAIL, 125 for memory.
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


def _unconfirmed(status: StatusFile | None, problem: str, now: float) -> JobState:
    if status is None:
        return JobState(state="UNKNOWN", source=NOBODY, reason=problem)
    return replace(_from_status(status, now), reason=f"not confirmed: {problem}")


def _forgotten(status: StatusFile | None, now: float) -> JobState:
    if status is None:
        return JobState(state="UNKNOWN", source="squeue", reason="Slurm knows no such job, and it wrote no status.json")
    reason = f"ended without saying why: Slurm no longer knows the job, and status.json stopped at {status.state}"
    return replace(_from_status(status, now), state="FAILED", source="squeue", age_s=0.0, reason=reason)


def _age(status: StatusFile, now: float) -> float | None:
    return None if status.updated_at is None else round(max(0.0, now - status.updated_at), 1)
