"""attempt.json: where an attempt began and how it ended. status.json only knows the newest one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from janus_cluster.config.schema import MemoryPlan
from janus_cluster.node.batch_log import say
from janus_cluster.observe.checkpoints import find_newest_checkpoint
from janus_cluster.rundir import RunDir, name_of_trouble, read_json, write_json_atomically


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """Attempts of the same job, just before this one, that began at the same step: none of them got anywhere."""

    count: int
    last_words: str | None = None


class Ledger:
    """One attempt's own record, and what those before it tell. `from_step`: of the newest whole checkpoint, or 0."""

    def __init__(
        self,
        run: RunDir,
        *,
        attempt: int,
        job_id: str | None,
        nodes: Sequence[str],
        memory: MemoryPlan | None = None,
    ) -> None:
        self._run = run
        self._attempt = attempt
        self._job_id = job_id
        self.from_step = newest_step(run)
        self._value: dict[str, Any] = {
            "schema_version": 1,
            "attempt": attempt,
            "job_id": job_id,
            "nodes": list(nodes),
            "from_step": self.from_step,
            "started_at": time.time(),
            "ended_at": None,
            "state": "RUNNING",
            "exit_code": None,
            "reason": None,
            "hang": None,
            # Which option of training.memory: auto ran, and why not the one before it.
            "memory": None
            if memory is None
            else {"option": memory.taken, "words": memory.option.words, "because": memory.because},
        }
        # Without it nobody could tell attempts that get nowhere, so this one must not begin.
        write_json_atomically(self._run.attempt_json(self._attempt), self._value)

    def write(self, **changes: Any) -> None:
        """The file holds `changes`; where it cannot be written now, the log says so, and the attempt goes on."""
        self._value |= changes
        try:
            write_json_atomically(self._run.attempt_json(self._attempt), self._value)
        except OSError as e:
            say(f"{self._run.attempt_json(self._attempt)}: {name_of_trouble(e)}")

    def end(self, state: str, exit_code: int, reason: str | None) -> None:
        """How it ended stands in the file."""
        self.write(state=state, exit_code=exit_code, reason=reason, ended_at=time.time())

    def earlier_without_progress(self) -> Earlier:
        """The unbroken row of attempts of this job that began where this one does.

        One with another option of training.memory: auto was another try. One that was stopped in the queue's interest
        before its first checkpoint counts too: a walltime shorter than the way to the next checkpoint would requeue for
        ever.
        """
        count, words = 0, None
        for attempt in reversed([n for n in self._run.attempts() if n < self._attempt]):
            try:
                record = read_json(self._run.attempt_json(attempt))
            except (OSError, ValueError):
                break
            if record.get("job_id") != self._job_id or record.get("from_step") != self.from_step:
                break
            if record.get("memory") != self._value["memory"]:
                break
            count += 1
            words = words or record.get("reason")
        return Earlier(count=count, last_words=words)


def newest_step(run: RunDir) -> int:
    """The step of the newest whole checkpoint; 0 without one."""
    found = find_newest_checkpoint(run)
    return 0 if found is None else found.step
