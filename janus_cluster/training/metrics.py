"""The events of training: one line of metrics.jsonl and one readable line of log each, from rank 0 only."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from janus_cluster.janusvln.held_out import HeldOutScores, render_score_line
from janus_cluster.janusvln.loss import SEGMENT_NAMES
from janus_cluster.run.files import name_of_trouble
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.metrics import (
    CheckpointEvent,
    CompleteEvent,
    EvalEvent,
    Event,
    StopEvent,
    TrainEvent,
    append_event,
)

# Some hours of steps, in 20 MB.
_MOST_UNWRITTEN = 4096


class MetricsLog(TrainerCallback):  # type: ignore[misc]
    """Writes every logged step, evaluation, checkpoint and export of one attempt.

    Units: num_tokens is per optimizer step over all ranks, padding_share the part of the batches that holds none;
    step_time_s is wall time per optimizer step without checkpoints and evaluations, waiting for data included; ranks
    holds lists by rank: data_wait_s and visual_tokens per step, gpu_memory_peak_gb (1e9 bytes) since the start;
    first_collective_s from a step's begin until this rank joins its first collective (data_wait_s is a part of it), and
    first_collective_wait_s from there until all ranks have.
    """

    def __init__(self, run: RunDir, *, attempt: int, is_main: bool, effective_batch_size: int) -> None:
        self._run = run
        self._attempt = attempt
        self._is_main = is_main
        self._effective_batch_size = effective_batch_size
        self._since_s = time.perf_counter()
        self._unwritten: deque[Event] = deque(maxlen=_MOST_UNWRITTEN)
        self.last_logged_step = 0
        # Of the step that is logged next: a list by rank for everything that differs between ranks.
        self.ranks: dict[str, list[float]] = {}

    def append(self, event: Event) -> None:
        """Append a line to metrics.jsonl, with the time and the attempt, if this is rank 0.

        What cannot be written now is written with the next one. Raises: OSError for a StopEvent or a
        CompleteEvent: they decide how the attempt ended.
        """
        if self._is_main:
            self._unwritten.append(replace(event, time=time.time(), attempt=self._attempt))
            try:
                while self._unwritten:
                    append_event(self._run, self._unwritten[0])
                    self._unwritten.popleft()
            except OSError as error:
                if isinstance(event, (StopEvent, CompleteEvent)):
                    raise
                self.log(f"warning: {self._run.metrics_jsonl}: {name_of_trouble(error)}; it is tried again")

    def log(self, line: str) -> None:
        """Print `line` into rank 0's log."""
        if self._is_main:
            with contextlib.suppress(OSError):
                # A full disk must not end training that could still be saved elsewhere.
                print(line, flush=True)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._restart_clock(state)
        self.log(
            f"training: {state.global_step} of {state.max_steps} steps done, "
            f"{self._effective_batch_size} samples a step"
        )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        num_steps = max(1, state.global_step - self.last_logged_step)
        step_time_s = (time.perf_counter() - self._since_s) / num_steps
        self._restart_clock(state)
        event = TrainEvent(
            step=state.global_step,
            total_steps=state.max_steps,
            epoch=round(state.epoch or 0.0, 4),
            loss=logs["loss"],
            loss_text=logs["loss_text"],
            loss_action=logs["loss_action"],
            loss_segments={segment: logs[f"loss_segment_{segment}"] for segment in SEGMENT_NAMES},
            learning_rate=logs["learning_rate"],
            grad_norm=logs.get("grad_norm"),
            num_tokens=logs["num_tokens"],
            padding_share=round(logs["padding_share"], 4),
            step_time_s=step_time_s,
            samples_per_s=self._effective_batch_size / step_time_s,
            ranks=self.ranks,
        )
        self.append(event)
        self.log(
            f"step {state.global_step}/{state.max_steps} loss {logs['loss']:.3f} action {logs['loss_action']:.3f} "
            f"lr {logs['learning_rate']:.1e} step_time_s {step_time_s:.2f}"
        )

    def saved(self, step: int, path: Path, duration_s: float) -> None:
        """Record the checkpoint in metrics.jsonl and in the log; its time is not a step's."""
        self.append(CheckpointEvent(step=step, path=str(path), duration_s=duration_s))
        self.log(f"checkpoint {path}")
        self._since_s += duration_s

    def evaluated(self, step: int, scores: HeldOutScores, duration_s: float) -> None:
        """Record the scores in metrics.jsonl and, in one line, in the log; their time is not a step's."""
        head, majority = scores.head, scores.majority
        event = EvalEvent(
            step=step,
            num_samples=head.num_samples,
            action_accuracy=head.accuracy,
            majority_accuracy=majority.accuracy,
            majority_action=majority.action,
            macro_f1=head.macro_f1,
            f1_by_action={action: score.f1 for action, score in head.by_action.items()},
            perplexity_by_segment=dict(scores.perplexity_by_segment),
            duration_s=duration_s,
        )
        self.append(event)
        self.log(f"step {step}: {render_score_line(scores)}")
        self._since_s += duration_s

    def _restart_clock(self, state: TrainerState) -> None:
        self._since_s = time.perf_counter()
        self.last_logged_step = state.global_step
