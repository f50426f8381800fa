"""transformers' Trainer with what JanusVLN needs: own parameter groups, one loss per optimizer step, honest parts.

B rows of a micro-batch · A micro-batches of an optimizer step · W ranks
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed.ops
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from janus_cluster.config.schema import JobConfig
from janus_cluster.training.checkpoint import clear_checkpoint, complete_checkpoint
from janus_cluster.training.data.samples import ACTIONS
from janus_cluster.training.loss import SEGMENT_NAMES, action_count, text_weight_sum
from janus_cluster.training.metrics import MetricsLog
from janus_cluster.training.model.build import parameter_groups
from janus_cluster.training.world import World

Batch = dict[str, Any]


def build_training_arguments(
    job: JobConfig, *, output_dir: Path, ds_config_json: Path | None, device: str
) -> TrainingArguments:
    """transformers' arguments for `job`. Make them before the model: ZeRO-3 shards it while it is built.

    Without `ds_config_json` the Trainer trains on plain torch (tests on one process do).
    """
    training = job.training
    if device == "cpu" and ds_config_json is not None:
        _skip_compiling_unused_kernels()
    return TrainingArguments(
        output_dir=str(output_dir),
        deepspeed=None if ds_config_json is None else str(ds_config_json),
        use_cpu=device == "cpu",
        bf16=training.precision == "bf16",
        per_device_train_batch_size=training.per_device_batch_size,
        per_device_eval_batch_size=training.per_device_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        num_train_epochs=training.num_epochs,
        max_steps=training.max_steps or -1,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler,
        warmup_steps=training.warmup_ratio,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        data_seed=training.seed,
        ddp_timeout=training.ddp_timeout_s,
        dataloader_num_workers=job.data.num_workers,
        dataloader_pin_memory=device == "cuda",
        remove_unused_columns=False,
        label_names=["actions"],
        logging_strategy="steps",
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=job.checkpoint.every_steps,
        save_total_limit=None,
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="warning",
    )


def compute_action_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of right actions, and of the most frequent action, among the samples that have one."""
    logits, actions = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
    known = actions >= 0
    logits, actions = logits[known], actions[known]
    num_samples = int(known.sum())
    counts = torch.bincount(actions, minlength=len(ACTIONS))
    return {
        "num_samples": num_samples,
        "action_accuracy": float((logits.argmax(-1) == actions).float().mean()) if num_samples else 0.0,
        "majority_accuracy": float(counts.max()) / max(1, num_samples),
        "majority_index": int(counts.argmax()),
    }


def _skip_compiling_unused_kernels() -> None:
    """DeepSpeed no longer compiles its shared-memory all-reduce on cpu: only inference calls it, and it needs g++."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class JanusTrainer(Trainer):  # type: ignore[misc]
    """Trainer whose gradients do not depend on how a batch is cut into micro-batches and ranks."""

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: TrainingArguments,
        job: JobConfig,
        world: World,
        metrics: MetricsLog,
        train_dataset: Dataset[Batch],
        data_collator: Callable[[Sequence[Batch]], Batch],
    ) -> None:
        self._job = job
        self._world = world
        self._metrics = metrics
        self._loss_denominator: torch.Tensor | None = None
        if job.training.gradient_checkpointing:
            model.activation_checkpointing_enable()
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=data_collator,
            compute_metrics=compute_action_accuracy,
            callbacks=[metrics],
        )
        self.remove_callback(PrinterCallback)
        # text loss and action loss, then Σ(w·CE) and Σw of the four segments, all since the last log
        self._sums_since_log = torch.zeros(2 + 2 * len(SEGMENT_NAMES), device=self.args.device)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the trainable parameters, each group with its own learning rate; frozen ones are not in it."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(
                parameter_groups(self.model if model is None else model, self._job.training),
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                fused=self.args.device.type == "cuda",
            )
        return self.optimizer

    def _prepare_input(self, data: Any) -> Any:
        """`data` on this rank's device, lists of tensors too, with its dtypes kept.

        The Trainer's own turns every float into bf16 under DeepSpeed, loss weights included.
        """
        if isinstance(data, torch.Tensor):
            return data.to(self.args.device)
        if isinstance(data, dict):
            return {key: self._prepare_input(value) for key, value in data.items()}
        if isinstance(data, (list, tuple)):
            return [self._prepare_input(value) for value in data]
        return data

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], None]:
        """The micro-batches of the next optimizer step; the denominators of their losses are known after the call.

        The Trainer divides each micro-loss by A and DeepSpeed takes the mean over W, so Σ over the whole step,
        divided by W·A, makes the gradient that of one batch holding everything.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            text = torch.stack([text_weight_sum(b["labels"], b["loss_weights"]).float() for b in batches]).sum()
            actions = torch.stack([action_count(b["actions"]).float() for b in batches]).sum()
            totals = self._sum_over_ranks(torch.stack([text, actions]).to(self.args.device))
            self._loss_denominator = totals.clamp(min=1.0) / (len(batches) * self._world.world_size)
        return batches, None

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's share of the step's loss; its parts are kept for the next log."""
        output = model(
            **inputs,
            action_loss_weight=self._job.training.action_loss_weight,
            loss_denominator=self._loss_denominator if model.training else None,
        )
        if model.training:
            share = torch.stack([output.text_loss, output.action_loss]).float()
            share /= self.current_gradient_accumulation_steps * self._world.world_size
            self._sums_since_log += torch.cat([share, output.segment_loss_sum, output.segment_weight_sum])
        return (output.loss, output) if return_outputs else output.loss

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Loss, action logits [B,4] and actions [B] of one held-out batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, output = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        return loss.detach(), output.action_logits.detach(), inputs["actions"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss over all ranks to a step's log; every rank calls this for the same steps."""
        if "loss" in logs:
            sums = self._sum_over_ranks(self._sums_since_log).tolist()
            self._sums_since_log.zero_()
            num_steps = max(1, self.state.global_step - self._metrics.last_logged_step)
            logs["loss_text"], logs["loss_action"] = sums[0] / num_steps, sums[1] / num_steps
            loss_sums, weight_sums = sums[2 : 2 + len(SEGMENT_NAMES)], sums[2 + len(SEGMENT_NAMES) :]
            for segment, loss_sum, weight_sum in zip(SEGMENT_NAMES, loss_sums, weight_sums, strict=True):
                logs[f"loss_segment_{segment}"] = loss_sum / weight_sum if weight_sum else 0.0
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's checkpoint of every rank, then the manifest that makes it complete, then the old ones go."""
        checkpoints, step = Path(self.args.output_dir), self.state.global_step
        clear_checkpoint(checkpoints, step=step, world=self._world)
        super()._save_checkpoint(model, trial)
        complete_checkpoint(checkpoints, step=step, world=self._world, keep_last=self._job.checkpoint.keep_last)

    def _run_epoch(self, **kwargs: Any) -> None:
        """Nothing happens where a resumed run had already done all its steps; the Trainer would do one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        if dist.is_initialized():
            values = values.clone()
            dist.all_reduce(values)
        return values
