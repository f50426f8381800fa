"""attempt.json: where an attempt began and how it ended. status.json holds only the newest one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from janus_cluster.job.resolved import MemoryPlan
from janus_cluster.node.batch_log import log_line
from janus_cluster.run.checkpoints import find_newest_checkpoint
from janus_cluster.run.files import name_of_trouble
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.attempt import AttemptRecord, MemoryRecord
from janus_cluster.run.records.failure import FailureRecord
from janus_cluster.run.records.metrics import TrainEvent, load_last_events

# An attempt that spends less of its time on steps that are kept uses its nodes for nothing.
_LEAST_SHARE = 0.1
_READ_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """Attempts of the same job, just before this one, that made no progress. `from_step`: where the first one began."""

    count: int
    from_step: int
    last_reason: str | None = None


class Ledger:
    """One attempt's own record, and those of earlier attempts. `from_step`: of the newest whole checkpoint, or 0."""

    def __init__(
        self,
        run: RunDir,
        *,
        attempt: int,
        job_id: str | None,
        nodes: Sequence[str],
        bundle: int,
        memory: MemoryPlan | None = None,
        because: str | None = None,
    ) -> None:
        self._run = run
        self._attempt = attempt
        self.from_step = newest_step(run)
        taken = None
        if memory is not None:
            taken = MemoryRecord(option=memory.taken, words=memory.option.words, because=because)
        self._record = AttemptRecord(
            attempt=attempt,
            job_id=job_id,
            nodes=tuple(nodes),
            bundle=bundle,
            from_step=self.from_step,
            started_at=time.time(),
            state="RUNNING",
            memory=taken,
        )
        # Without it a job whose attempts make no progress would not be noticed, so this attempt must not begin.
        self._record.write(run.attempt_json(attempt))

    def write(self, **changes: Any) -> None:
        """Write `changes` into the file; where it cannot be written now, log that and go on."""
        self._record = replace(self._record, **changes)
        try:
            self._record.write(self._run.attempt_json(self._attempt))
        except OSError as e:
            log_line(f"{self._run.attempt_json(self._attempt)}: {name_of_trouble(e)}")

    def end(self, state: str, exit_code: int, reason: str | None, failure: FailureRecord | None = None) -> None:
        """Record how the attempt ended, and for a failure why."""
        self.write(state=state, exit_code=exit_code, reason=reason, failure=failure, ended_at=time.time())

    def earlier_without_progress(self) -> Earlier:
        """The attempts of this job, without a gap before this one, of which less than a tenth went into kept steps.

        One with another bundle (a smaller option of training.memory: auto) is not counted. One that was requeued before
        its first checkpoint is counted: a walltime shorter than the way to the next checkpoint would requeue without
        limit.
        """
        count, reason, following = 0, None, self._record
        for attempt in reversed([n for n in self._run.attempts() if n < self._attempt]):
            record = AttemptRecord.load(self._run.attempt_json(attempt))
            if record is None or record.job_id != self._record.job_id or record.bundle != self._record.bundle:
                break
            if self._made_progress(record, following):
                break
            count += 1
            reason, following = reason or record.reason, record
        return Earlier(count=count, from_step=following.from_step, last_reason=reason)

    def _made_progress(self, record: AttemptRecord, following: AttemptRecord) -> bool:
        """Whether the steps that `following` goes on from took a fair share of the attempt before it."""
        kept = following.from_step - record.from_step
        if kept <= 0:
            return False
        took_s = (record.ended_at or following.started_at) - record.started_at
        events = load_last_events(self._run, most_bytes=_READ_BYTES)
        times = [e.step_time_s for e in events if isinstance(e, TrainEvent) and e.attempt == record.attempt]
        logged = [step_s for step_s in times if step_s is not None]
        # Without a logged step nothing is known against it.
        return not logged or kept * statistics.median(logged) >= _LEAST_SHARE * took_s


def completed_attempt(run: RunDir, job_id: str | None) -> int | None:
    """The newest attempt, if it is of this job and completed: a requeue of Slurm's has nothing left to do."""
    number = max(run.attempts(), default=0)
    record = AttemptRecord.load(run.attempt_json(number)) if number else None
    return number if record and record.state == "COMPLETED" and record.job_id == job_id is not None else None


def newest_step(run: RunDir) -> int:
    """The step of the newest whole checkpoint; 0 without one."""
    found = find_newest_checkpoint(run)
    return 0 if found is None else found.step
