"""transformers' Trainer, extended: stops at a step boundary, saves whole checkpoints, resumes on any cut.

It is independent of what is trained.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from janus_cluster.errors import TrainingFailed
from janus_cluster.janusvln.model.build import parameter_groups
from janus_cluster.job.schema import JobConfig
from janus_cluster.modelspec.zero_cut import Cut
from janus_cluster.run.checkpoints import step_of
from janus_cluster.training.metrics import MetricsLog
from janus_cluster.training.pulse import Pulse
from janus_cluster.training.reshard import load_resharded, written_cut
from janus_cluster.training.saving import new_checkpoint, warn_of_slow_save
from janus_cluster.training.world import World

# metrics.jsonl has them all; after 100,000 steps they would be 60 MB of trainer_state.json.
_LOGS_KEPT = 100


class _StopAtBoundary(TrainerCallback):  # type: ignore[misc]
    """A step that is to be the last of the attempt is logged and saved; nothing is evaluated, time may be short."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if self._trainer.is_stopping:
            control.should_log = control.should_save = control.should_training_stop = True
            control.should_evaluate = False


class ResumableTrainer(Trainer):  # type: ignore[misc]
    """Trainer whose checkpoints are whole, may be cut among other ranks, and are written when it is asked to stop."""

    control: TrainerControl

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: TrainingArguments,
        job: JobConfig,
        world: World,
        metrics: MetricsLog,
        pulse: Pulse | None,
        **of_trainer: Any,
    ) -> None:
        """Setting `is_stopping` during a step makes it the attempt's last. `pulse` gets the progress."""
        self._job = job
        self._pulse = pulse
        self._world = world
        self._metrics = metrics
        self._saves_in: Path | None = None
        self._has_warned_of_saves = False
        self._began_at_step = 0
        self.is_stopping = False
        super().__init__(model=model, args=args, callbacks=[metrics, _StopAtBoundary(self)], **of_trainer)
        self.remove_callback(PrinterCallback)
        # micro-batches of this rank whose loss was no finite number
        self._num_not_finite = torch.zeros((), device=self.args.device)
        if self.is_deepspeed_enabled:
            frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
            model.register_load_state_dict_post_hook(partial(_do_not_miss, frozen))

    def _require_finite(self, num_over_ranks: float) -> None:
        """Nothing, while every loss of all ranks was finite; else the weights are spoilt. Raises: TrainingFailed."""
        if not num_over_ranks:
            return
        step = self.state.global_step
        if not self._num_not_finite.item():
            # Not a cause of its own: a card must name the rank whose loss it was.
            raise TrainingFailed(f"the loss was not finite on another rank at step {step}", is_follow_up=True)
        if not self._has_changed_weights():
            raise TrainingFailed(
                f"the loss is not finite at step {step} on rank {self._world.rank}, before any weight was changed: the "
                "weights or the data give it, not the learning rate",
                hint="are model.path and model.vggt_path whole, and are the samples of this step usual ones?",
                kind="bad_weights",
            )
        raise TrainingFailed(
            f"the loss is not finite at step {step} on rank {self._world.rank}: nothing was saved after the checkpoint "
            "before it",
            hint="a smaller training.learning_rate or training.max_grad_norm, or precision fp32; resuming unchanged "
            "would meet it again",
            kind="diverged",
        )

    def _has_changed_weights(self) -> bool:
        """Whether this attempt had made an update, with a learning rate above 0, when the last loss was computed."""
        schedule = self.lr_scheduler
        rates = list(zip(schedule.base_lrs, schedule.lr_lambdas, strict=True))
        updates = range(self._began_at_step, self.state.global_step - 1)
        return any(base * factor(step) > 0 for step in updates for base, factor in rates)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save the checkpoint of this step whole and under its name; on an error the ones before it are unchanged.

        Raises: TrainingFailed where the state is spoilt, or the disk has no room for it.
        """
        started_s = time.perf_counter()
        self._beat("checkpoint")
        self._require_finite(self._sum_over_ranks(self._num_not_finite).item())
        self._require_finite_gradients()
        with new_checkpoint(
            Path(self.args.output_dir),
            step=self.state.global_step,
            world=self._world,
            keep_last=self._job.checkpoint.keep_last,
            keep_every=self._job.checkpoint.keep_every,
            about=self._describe_state(),
            beat=lambda: self._beat("checkpoint"),
        ) as self._saves_in:
            super()._save_checkpoint(model, trial)
        self._saves_in = None
        path = Path(super()._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        took_s = time.perf_counter() - started_s
        self._metrics.saved(self.state.global_step, path, took_s)
        warning = warn_of_slow_save(took_s, limit_s=self._job.restart.stop_timeout_s)
        if warning is not None and not self._has_warned_of_saves:
            self._metrics.log(f"warning: {warning}")
        self._has_warned_of_saves |= warning is not None

    def _get_output_dir(self, trial: Any) -> str:
        """Where the Trainer makes its checkpoint-<step>: aside, while one is being written."""
        return super()._get_output_dir(trial) if self._saves_in is None else str(self._saves_in)

    def _require_finite_gradients(self) -> None:
        """Nothing, where the norm of the last step's gradient is finite or not known. Raises: TrainingFailed."""
        norm = self.model_wrapped.get_global_grad_norm() if self.is_deepspeed_enabled else None
        # DeepSpeed writes -1 for a norm that is no number.
        if norm is not None and not 0 <= float(norm) < math.inf:
            raise TrainingFailed(
                f"the loss's gradient norm is not finite at step {self.state.global_step} ({float(norm)}): the weights "
                "are spoilt, and no checkpoint is written",
                hint="a smaller training.learning_rate or training.max_grad_norm, or precision fp32; the checkpoint "
                "before it is as it was",
                kind="diverged",
            )

    def _describe_state(self) -> dict[str, Any]:
        """The manifest's entries about the processes that wrote the checkpoint."""
        world_size = self._world.world_size
        zero_stage = None
        if self.is_deepspeed_enabled:
            zero_stage = Cut.of(self.args.hf_deepspeed_config.config, world_size=world_size).stage
        return {
            "zero_stage": zero_stage,
            "processes_per_node": int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
            "effective_batch_size": self.args.per_device_train_batch_size
            * self.args.gradient_accumulation_steps
            * world_size,
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Weights are in `output_dir`; but a checkpoint of DeepSpeed's needs none besides the engine's own shards.

        Gathering and writing them again would cost 16 GB and the time for it at every checkpoint of a 7B model.
        """
        if not (_internal_call and self.is_deepspeed_enabled):
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The engine's shards without the frozen weights, which are loaded from their source on resume too."""
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Model, optimizer and schedule are those of the checkpoint, also of one that was cut among ranks otherwise.

        Where the cut is the same, DeepSpeed loads its own files.
        """
        if resume_from_checkpoint is None:
            return super()._prepare_for_training(max_steps, train_dataloader, None)
        checkpoint = Path(resume_from_checkpoint)
        self._began_at_step = step_of(checkpoint)
        mine = written = None
        if self.is_deepspeed_enabled:
            written = written_cut(checkpoint)
            mine = Cut.of(self.args.hf_deepspeed_config.config, world_size=self._world.world_size)
        if written is None or mine is None or written == mine:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        else:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
            self._load_cut_anew(checkpoint, written, mine)
        self._follow_schedule()
        return prepared

    def _load_cut_anew(self, checkpoint: Path, written: Cut, mine: Cut) -> None:
        """Load the engine's and the schedule's state from `checkpoint`."""
        self._metrics.log(f"{checkpoint.name} was written by {written}; cut anew for {mine}")
        if written.world_size != mine.world_size and self._job.training.lora.dropout:
            # Nothing else draws random numbers while it trains.
            self._metrics.log("random states of other ranks cannot be taken over: training.lora.dropout draws anew")
        load_resharded(self.model_wrapped, checkpoint, groups=parameter_groups(self.model, self._job.training))
        # With DeepSpeed this is the schedule alone.
        self._load_optimizer_and_scheduler(str(checkpoint))

    def _follow_schedule(self) -> None:
        """Set the learning rates of the next step: the checkpoint's, unless the run has become longer since."""
        schedule = self.lr_scheduler
        steps = schedule.last_epoch
        rates = [base * factor(steps) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        # What the Trainer logs.
        schedule._last_lr = rates

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The weights of a checkpoint written without DeepSpeed, all of them.

        On disk they have the hub's names; the Trainer's own takes none of those, and only warns.
        """
        loaded = type(self.model).from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
        self.model.load_state_dict(loaded.state_dict())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's own, which keeps every log and writes all of them into each checkpoint."""
        super().log(logs, start_time)
        del self.state.log_history[:-_LOGS_KEPT]

    def _beat(self, doing: str) -> None:
        if self._pulse is not None:
            self._pulse.beat(doing, self.state.global_step)

    def _sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        if dist.is_initialized():
            values = values.clone()
            dist.all_reduce(values)
        return values


def _do_not_miss(names: Collection[str], module: nn.Module, incompatible: Any) -> None:
    """Let a state dict be loaded without `names`; anything else that is missing is still an error."""
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in names]
