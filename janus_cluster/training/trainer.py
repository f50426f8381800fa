"""The Trainer of JanusVLN: own parameter groups, one loss per optimizer step, honest parts.

Saving, stopping and resuming are in resumable.py.

B rows of a micro-batch · A micro-batches of an optimizer step · W ranks
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, TrainingArguments

from janus_cluster.janusvln.data.loader import build_loader, stuck_workers_named
from janus_cluster.janusvln.data.sampler import RankBatches
from janus_cluster.janusvln.held_out import HeldOutScores, ScoreSums, leave_out_head, move_to, predict_batches
from janus_cluster.janusvln.kernels import skip_unused_kernels
from janus_cluster.janusvln.loss import SEGMENT_NAMES, action_count, ramped_weight, text_weight_sum
from janus_cluster.janusvln.model.build import parameter_groups
from janus_cluster.job.schema import JobConfig
from janus_cluster.training.metrics import MetricsLog
from janus_cluster.training.pulse import Pulse
from janus_cluster.training.resumable import ResumableTrainer
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
        skip_unused_kernels()
    if ds_config_json is not None and dist.is_initialized():
        # ZeRO-3 asks DeepSpeed for the number of ranks while the model is built. accelerate sets it too, on GPUs only.
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False)
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
        # A count over all ranks that is not used here: waiting for it would count as waiting for this rank's data.
        average_tokens_across_devices=False,
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
        eval_strategy="steps" if training.evaluate_every_steps else "no",
        eval_steps=training.evaluate_every_steps,
        report_to="none",
        disable_tqdm=True,
        log_level="warning",
    )


class JanusTrainer(ResumableTrainer):
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
        batches: RankBatches,
        data_collator: Callable[[Sequence[Batch]], Batch],
        eval_dataset: Dataset[Batch] | None = None,
        pulse: Pulse | None = None,
        head_not_scored: str | None = None,
    ) -> None:
        """head_not_scored: why the action head's answers mean nothing; its accuracy is then not measured."""
        super().__init__(
            model=model,
            args=args,
            job=job,
            world=world,
            metrics=metrics,
            pulse=pulse,
            train_dataset=train_dataset,
            data_collator=data_collator,
            eval_dataset=eval_dataset,
        )
        self._batches = batches
        self._head_not_scored = head_not_scored
        self._loss_denominator: torch.Tensor | None = None
        self.held_out_scores: HeldOutScores | None = None
        self.evaluated_step: int | None = None
        # text loss and action loss, then Σ(w·CE) and Σw of the four segments, all since the last log
        self._sums_since_log = torch.zeros(2 + 2 * len(SEGMENT_NAMES), device=self.args.device)
        # over all ranks, since the last log: tokens, and the places for tokens that the batches hold
        self._tokens_since_log = torch.zeros(2, device=self.args.device)
        # since the last log, on this rank: s waited for batches, and tokens of images after the ViT's merging
        self._data_wait_s, self._visual_tokens = 0.0, 0
        # until this rank joined each step's first collective, and then until all had: s since the last log
        self._join_s, self._wait_s = 0.0, 0.0

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """This rank's micro-batches. Accelerate does not prepare it: it would share them out among the ranks again.

        The Trainer skips lists of indices on resume (accelerate's SkipBatchSampler), so nothing is decoded in vain.
        """
        return build_loader(
            self.train_dataset,
            batches=self._batches,
            collate=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            timeout_s=self._job.training.hang_timeout_s,
        )

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
        return move_to(data, self.args.device)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], None]:
        """The micro-batches of the next optimizer step; the denominators of their losses are known after the call.

        The Trainer divides each micro-loss by A and DeepSpeed takes the mean over W, so Σ over the whole step,
        divided by W·A, makes the gradient that of one batch holding everything.

        The ranks agree here, in the same reduction, on whether this step is to be the last of the attempt.
        Raises: TrainingFailed if a loss of the step before was no finite number.
        """
        self._beat("data")
        asked_s = time.perf_counter()
        with stuck_workers_named():
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._data_wait_s += time.perf_counter() - asked_s
        self._beat("agreement")
        if batches:
            text = torch.stack([text_weight_sum(b["labels"], b["loss_weights"]).float() for b in batches]).sum()
            actions = torch.stack([action_count(b["actions"]).float() for b in batches]).sum()
            masks = [b["attention_mask"] for b in batches]
            merged = self.model.config.vision_config.spatial_merge_size**2
            self._visual_tokens += sum(int(b["image_grid_thw"].prod(-1).sum()) // merged for b in batches)
            counts = torch.tensor([sum(int(m.sum()) for m in masks), sum(m.numel() for m in masks)])
            asked = torch.tensor([float(self._pulse is not None and self._pulse.is_asked_to_stop())])
            own = torch.cat([torch.stack([text, actions]), counts, asked]).to(self.args.device)
            # The copy to the device has waited for what the step before had left to do there.
            joined_s = time.perf_counter()
            totals = self._sum_over_ranks(torch.cat([own, self._num_not_finite[None]]))
            num_asked, num_not_finite = totals[4:].tolist()
            self._join_s += joined_s - asked_s
            self._wait_s += time.perf_counter() - joined_s
            self._require_finite(num_not_finite)
            self.is_stopping = num_asked > 0
            self._beat("step")
            self._loss_denominator = totals[:2].clamp(min=1.0) / (len(batches) * self._world.world_size)
            self._tokens_since_log += totals[2:4]
        return batches, None

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's share of the step's loss; its parts are kept for the next log."""
        training = self._job.training
        action_loss_weight = training.action_loss_weight
        if model.training:
            action_loss_weight = ramped_weight(
                self.state.global_step, ramp_steps=training.action_loss_ramp_steps, weight=action_loss_weight
            )
        output = model(
            **inputs,
            action_loss_weight=action_loss_weight,
            loss_denominator=self._loss_denominator if model.training else None,
        )
        self._beat("step")
        if model.training:
            self._num_not_finite += (~torch.isfinite(output.loss.detach())).float()
            share = torch.stack([output.text_loss, output.action_loss]).float()
            share /= self.current_gradient_accumulation_steps * self._world.world_size
            self._sums_since_log += torch.cat([share, output.segment_loss_sum, output.segment_weight_sum])
        return (output.loss, output) if return_outputs else output.loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float | None]:
        """The held-out scores at this step are known on every rank, in the log and in metrics.jsonl."""
        started_s = time.perf_counter()
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if not len(dataset):
            return {}
        sums = ScoreSums(self.args.device)
        for result in predict_batches(
            self.model,
            dataset,
            num_samples=len(dataset),
            collate=self.data_collator,
            device=self.args.device,
            rows=self.args.per_device_eval_batch_size,
            num_workers=self.args.dataloader_num_workers,
            timeout_s=self._job.training.hang_timeout_s,
            rank=self._world.rank,
            world_size=self._world.world_size,
        ):
            sums.add(result)
            self._beat("evaluation")
        scores = sums.scores()
        self.held_out_scores = scores if self._head_not_scored is None else leave_out_head(scores)
        self.evaluated_step = self.state.global_step
        self._metrics.evaluated(self.state.global_step, self.held_out_scores, time.perf_counter() - started_s)
        found = {f"{metric_key_prefix}_action_accuracy": self.held_out_scores.head.accuracy}
        # This also clears the request to evaluate: the last step would be evaluated once more at the epoch's end.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

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
            num_tokens, num_places = self._tokens_since_log.tolist()
            self._tokens_since_log.zero_()
            logs["num_tokens"] = round(num_tokens / num_steps)
            logs["padding_share"] = 1 - num_tokens / num_places if num_places else 0.0
            self._metrics.ranks = self._gather_ranks(num_steps)
        super().log(logs, start_time)

    def _gather_ranks(self, num_steps: int) -> dict[str, list[float]]:
        """What differs between ranks, by rank: per step since the last log, and the GPU memory's peak so far."""
        own = [self._data_wait_s, self._visual_tokens, self._join_s, self._wait_s]
        own = [value / num_steps for value in own]
        if self.args.device.type == "cuda":
            own.append(torch.cuda.max_memory_allocated(self.args.device) / 1e9)
        self._data_wait_s, self._visual_tokens, self._join_s, self._wait_s = 0.0, 0, 0.0, 0.0
        place = torch.zeros(self._world.world_size, len(own), device=self.args.device)
        place[self._world.rank] = torch.tensor(own, device=self.args.device)
        names = ("data_wait_s", "visual_tokens", "first_collective_s", "first_collective_wait_s", "gpu_memory_peak_gb")
        columns = self._sum_over_ranks(place).T.tolist()
        return {name: [round(v, 4) for v in column] for name, column in zip(names, columns, strict=False)}

    def _run_epoch(self, **kwargs: Any) -> None:
        """The epoch's own batches; none where a resumed run had done all its steps (the Trainer would do one more)."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        self._batches.set_epoch(kwargs["epoch"])
        super()._run_epoch(**kwargs)
