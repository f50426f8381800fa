"""How long each part of a start took, from this process to its first optimizer step; logged once by rank 0."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from janus_cluster.run.records.metrics import StartEvent
from janus_cluster.training.metrics import MetricsLog


class StartClock:
    """Seconds of the parts of a start, one after the other: each `mark` ends a part, and the next one begins.

    The first two are over when it is made: `launch`, from the node's own task (which execs torchrun) to this process,
    and Python and its imports until now.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        begun_s, launched_s = age_s("self"), age_s(str(os.getppid()))
        if begun_s is not None and launched_s is not None:
            self.seconds["launch"] = max(0.0, launched_s - begun_s)
        self._since_s = time.perf_counter() - (begun_s or 0.0)
        self.mark("imports")

    def mark(self, part: str) -> None:
        """The part that ends now was `part`."""
        now_s = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now_s - self._since_s
        self._since_s = now_s


class LogStart(TrainerCallback):  # type: ignore[misc]
    """After the first step of the attempt, a record of kind `start` in metrics.jsonl and a line in the log."""

    def __init__(self, clock: StartClock, metrics: MetricsLog) -> None:
        self._clock: StartClock | None = clock
        self._metrics = metrics

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._mark("engine")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._mark("first_batch")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._mark("first_step")
        if self._clock is None:
            return
        seconds = {part: round(value, 3) for part, value in self._clock.seconds.items()}
        self._clock = None
        total_s = round(sum(seconds.values()), 3)
        self._metrics.append(StartEvent(step=state.global_step, total_s=total_s, seconds=seconds))
        parts = ", ".join(f"{part.replace('_', ' ')} {value:.1f}" for part, value in seconds.items())
        self._metrics.log(f"first step done {total_s:.1f} s after the start: {parts}")

    def _mark(self, part: str) -> None:
        if self._clock is not None:
            self._clock.mark(part)


def age_s(process: str) -> float | None:
    """Seconds since /proc/`process` began; None where there is no such thing. Exact to 1/100 s."""
    try:
        stat = Path("/proc", process, "stat").read_text(encoding="utf-8", errors="replace")
        # The second field is the program's name in brackets, and may hold anything.
        ticks = int(stat.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
