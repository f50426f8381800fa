"""What training tells the world: one line of metrics.jsonl and one readable line of log per event, from rank 0 only."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from janus_cluster.rundir import RunDir, name_of_trouble
from janus_cluster.training.held_out import HeldOutScores, render_score_line
from janus_cluster.training.loss import SEGMENT_NAMES

# Some hours of steps, in 20 MB.
_MOST_UNWRITTEN = 4096


class MetricsLog(TrainerCallback):  # type: ignore[misc]
    """Writes every logged step, evaluation, checkpoint and export of one attempt.

    Units: num_tokens is per optimizer step over all ranks, padding_share the part of the batches that holds none;
    step_time_s is wall time per optimizer step without checkpoints and evaluations, waiting for data included; ranks
    holds lists by rank: data_wait_s and visual_tokens per step, gpu_memory_peak_gb (1e9 bytes) since the start.
    """

    def __init__(self, run: RunDir, *, attempt: int, is_main: bool, effective_batch_size: int) -> None:
        self._run = run
        self._attempt = attempt
        self._is_main = is_main
        self._effective_batch_size = effective_batch_size
        self._since_s = time.perf_counter()
        self._unwritten: deque[dict[str, Any]] = deque(maxlen=_MOST_UNWRITTEN)
        self.last_logged_step = 0
        # Of the step that is logged next: a list by rank for everything that differs between ranks.
        self.ranks: dict[str, list[float]] = {}

    def append(self, kind: str, step: int, **values: Any) -> None:
        """One line more in metrics.jsonl, if this is rank 0.

        What cannot be written now is written with the next one. Raises: OSError for a `stop`, without which the attempt
        would be taken for a completed one.
        """
        if self._is_main:
            record = {"kind": kind, "time": time.time(), "attempt": self._attempt, "step": step, **values}
            self._unwritten.append(record)
            try:
                while self._unwritten:
                    self._run.append_metric(self._unwritten[0])
                    self._unwritten.popleft()
            except OSError as error:
                if kind == "stop":
                    raise
                self.say(f"warning: {self._run.metrics_jsonl}: {name_of_trouble(error)}; it is tried again")

    def say(self, line: str) -> None:
        """`line` stands in rank 0's log."""
        if self._is_main:
            with contextlib.suppress(OSError):
                # A full disk must not end training that could still be saved elsewhere.
                print(line, flush=True)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._restart_clock(state)
        self.say(
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
        self.append(
            "train",
            state.global_step,
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
        self.say(
            f"step {state.global_step}/{state.max_steps} loss {logs['loss']:.3f} action {logs['loss_action']:.3f} "
            f"lr {logs['learning_rate']:.1e} step_time_s {step_time_s:.2f}"
        )

    def saved(self, step: int, path: Path, duration_s: float) -> None:
        """The checkpoint stands in metrics.jsonl and in the log; its time is not a step's."""
        self.append("checkpoint", step, path=str(path), duration_s=duration_s)
        self.say(f"checkpoint {path}")
        self._since_s += duration_s

    def evaluated(self, step: int, scores: HeldOutScores, duration_s: float) -> None:
        """The scores stand in metrics.jsonl and, in one line, in the log; their time is not a step's."""
        head, majority = scores.head, scores.majority
        self.append(
            "eval",
            step,
            num_samples=head.num_samples,
            action_accuracy=head.accuracy,
            majority_accuracy=majority.accuracy,
            majority_action=majority.action,
            macro_f1=head.macro_f1,
            f1_by_action={action: score.f1 for action, score in head.by_action.items()},
            perplexity_by_segment=dict(scores.perplexity_by_segment),
            duration_s=duration_s,
        )
        self.say(f"step {step}: {render_score_line(scores)}")
        self._since_s += duration_s

    def _restart_clock(self, state: TrainerState) -> None:
        self._since_s = time.perf_counter()
        self.last_logged_step = state.global_step
