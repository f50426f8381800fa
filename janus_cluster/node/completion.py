"""Detects training that has recorded its completion while its processes do not end."""

from __future__ import annotations

import time
from collections.abc import Callable

from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.metrics import CompleteEvent, load_last_events

# After that record the ranks leave within seconds. A slurmstepd that hangs would keep the step until the walltime.
LEAVE_S = 60.0
_LOOK_S = 5.0
# The record is the attempt's last line.
_READ_BYTES = 1 << 16


class Completion:
    """Looks for the attempt's last record, and how long ago it was first seen."""

    def __init__(self, run: RunDir, *, attempt: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._run = run
        self._attempt = attempt
        self._clock = clock
        self._looked_s = clock()
        self._seen_s: float | None = None

    @property
    def is_recorded(self) -> bool:
        return self._seen_s is not None

    def is_overdue(self) -> bool:
        """Whether the processes should have ended by now. Reads the file every 5 s, until the record is there."""
        now_s = self._clock()
        if self._seen_s is None and now_s - self._looked_s >= _LOOK_S:
            self._looked_s = now_s
            events = load_last_events(self._run, most_bytes=_READ_BYTES)
            if any(isinstance(event, CompleteEvent) and event.attempt == self._attempt for event in events):
                self._seen_s = now_s
        return self._seen_s is not None and now_s - self._seen_s >= LEAVE_S
