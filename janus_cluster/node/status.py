"""status.json: the running attempt tells where it stands. One writer: the attempt on node 0."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from janus_cluster.node.batch_log import say
from janus_cluster.rundir import RunDir, name_of_trouble, write_json_atomically

HEARTBEAT_S = 15.0


class StatusFile:
    """Holds the attempt's state and writes it whole at every change and at every heartbeat."""

    def __init__(self, run: RunDir, *, cluster: str, job_id: str | None, attempt: int, nodes: Sequence[str]) -> None:
        self._run = run
        self.is_written = True
        self._value: dict[str, Any] = {
            "schema_version": 1,
            "cluster": cluster,
            "job_id": job_id,
            "attempt": attempt,
            "state": "RUNNING",
            "phase": "preflight",
            "nodes": list(nodes),
            "exit_code": None,
            "signal": None,
            "reason": None,
            "started_at": time.time(),
        }
        self.update()

    def update(self, **changes: Any) -> None:
        """The file holds `changes`, and a fresh time; where it cannot be written now, `is_written` says so."""
        self._value |= changes | {"updated_at": time.time()}
        try:
            write_json_atomically(self._run.status_json, self._value)
            self.is_written = True
        except OSError as e:
            # A full disk, or a file system that is away for a while, must not end the training of all nodes.
            if self.is_written:
                say(f"{self._run.status_json}: {name_of_trouble(e)}")
            self.is_written = False

    def finish(self, state: str, exit_code: int, *, reason: str | None = None, signal: int | None = None) -> None:
        """The attempt is over; nothing is written after this."""
        self.update(state=state, phase="done", exit_code=exit_code, reason=reason, signal=signal)
