"""status.json: the state of the running attempt. One writer: the attempt on node 0."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from janus_cluster.node.batch_log import log_line
from janus_cluster.run.files import name_of_trouble
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.submission import Cluster, StatusRecord

HEARTBEAT_S = 15.0


class StatusWriter:
    """Holds the attempt's state and writes it whole at every change and at every heartbeat."""

    def __init__(
        self, run: RunDir, *, cluster: Cluster, job_id: str | None, attempt: int, nodes: Sequence[str]
    ) -> None:
        self._run = run
        self.is_written = True
        self._record = StatusRecord(
            cluster=cluster,
            job_id=job_id,
            attempt=attempt,
            state="RUNNING",
            phase="preflight",
            nodes=tuple(nodes),
            started_at=time.time(),
        )
        self.update()

    def update(self, **changes: Any) -> None:
        """Write `changes` and the present time; where the file cannot be written now, `is_written` is False."""
        self._record = replace(self._record, **changes, updated_at=time.time())
        try:
            self._record.write(self._run.status_json)
            self.is_written = True
        except OSError as e:
            # A full disk, or a file system that is away for a while, must not end the training of all nodes.
            if self.is_written:
                log_line(f"{self._run.status_json}: {name_of_trouble(e)}")
            self.is_written = False

    def finish(self, state: str, exit_code: int, *, reason: str | None = None, signal: int | None = None) -> None:
        """Write the end of the attempt; nothing is written after this."""
        self.update(state=state, phase="done", exit_code=exit_code, reason=reason, signal=signal)
