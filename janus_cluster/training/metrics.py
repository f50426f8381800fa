"""What training tells the world: one line of metrics.jsonl and one readable line of log per event, from rank 0 only."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from janus_cluster.rundir import RunDir
from janus_cluster.training.data.samples import ACTIONS
from janus_cluster.training.loss import SEGMENT_NAMES


class MetricsLog(TrainerCallback):  # type: ignore[misc]
    """Writes every logged step, evaluation, checkpoint and export of one attempt.

    Units: step_time_s is wall time per optimizer step without checkpoints and evaluations, waiting for data included.
    """

    def __init__(self, run: RunDir, *, attempt: int, is_main: bool, effective_batch_size: int) -> None:
        self._run = run
        self._attempt = attempt
        self._is_main = is_main
        self._effective_batch_size = effective_batch_size
        self._since_s = time.perf_counter()
        self.last_logged_step = 0

    def append(self, kind: str, step: int, **values: Any) -> None:
        """One line more in metrics.jsonl, if this is rank 0."""
        if self._is_main:
            record = {"kind": kind, "time": time.time(), "attempt": self._attempt, "step": step, **values}
            self._run.append_metric(record)

    def say(self, line: str) -> None:
        """`line` stands in rank 0's log."""
        if self._is_main:
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
            step_time_s=step_time_s,
            samples_per_s=self._effective_batch_size / step_time_s,
        )
        self.say(
            f"step {state.global_step}/{state.max_steps} loss {logs['loss']:.3f} action {logs['loss_action']:.3f} "
            f"lr {logs['learning_rate']:.1e} step_time_s {step_time_s:.2f}"
        )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.append("checkpoint", state.global_step, path=str(path))
        self.say(f"checkpoint {path}")
        self._since_s = time.perf_counter()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if metrics is None:
            return
        accuracy, majority = metrics["eval_action_accuracy"], metrics["eval_majority_accuracy"]
        num_samples, majority_action = metrics["eval_num_samples"], ACTIONS[metrics["eval_majority_index"]]
        self.append(
            "eval",
            state.global_step,
            num_samples=num_samples,
            action_accuracy=accuracy,
            majority_accuracy=majority,
            majority_action=majority_action,
        )
        self.say(
            f"held-out action accuracy {accuracy:.2f} (majority class {majority:.2f}, {majority_action}, "
            f"{num_samples} samples)"
        )
        self._since_s = time.perf_counter()

    def _restart_clock(self, state: TrainerState) -> None:
        self._since_s = time.perf_counter()
        self.last_logged_step = state.global_step
