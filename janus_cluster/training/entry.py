"""One training process: python -m janus_cluster.training RUN_DIR --attempt 1 --node NAME, under torchrun.

Everything it needs was decided on the login node and is in the run folder; nothing is derived again here.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from janus_cluster.errors import UsageError
from janus_cluster.janusvln.data.dataset import NavigationDataset, collate
from janus_cluster.janusvln.data.index import SampleSplit, load_samples
from janus_cluster.janusvln.data.indexing import Reporter
from janus_cluster.janusvln.data.lengths import load_token_counts
from janus_cluster.janusvln.data.prompt import sample_texts
from janus_cluster.janusvln.data.split import load_earlier_split, warn_of_leak
from janus_cluster.janusvln.data.tokenizer import build_tiny_tokenizer, load_tokenizer, tokenizer_ids
from janus_cluster.janusvln.held_out import render_score_table
from janus_cluster.janusvln.model.build import build_model, parameter_groups, render_parameter_groups
from janus_cluster.janusvln.model.janus import JanusModel
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.job.schema import JobConfig
from janus_cluster.modelspec.check_weights import why_head_is_random
from janus_cluster.run.checkpoints import step_of
from janus_cluster.run.next_command import command_for
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.bundle import load_resolved
from janus_cluster.run.records.metrics import CheckpointBrokenEvent, CompleteEvent, ExportEvent, ResumeEvent, StopEvent
from janus_cluster.training.batches import build_batches, note_samples
from janus_cluster.training.checkpoint import agree_on_resume
from janus_cluster.training.export import write_exports
from janus_cluster.training.failure import failure_recorded
from janus_cluster.training.memory import MemoryWatch
from janus_cluster.training.metrics import MetricsLog
from janus_cluster.training.pulse import Pulse, take_signals
from janus_cluster.training.stall import StallReport
from janus_cluster.training.start import LogStart, StartClock
from janus_cluster.training.trainer import JanusTrainer, build_training_arguments
from janus_cluster.training.world import World, error_recorded, load_world, process_group, redirect_output, share_among


@error_recorded
def main(argv: Sequence[str] | None = None) -> None:
    """Do all of this rank's work; its output is in its own log, its error (if any) in its own record."""
    clock = StartClock()
    arguments = _parse_arguments(argv)
    take_signals()
    run = RunDir(arguments.run_dir)
    resolved = load_resolved(run.bundle(arguments.bundle))
    world = load_world(resolved.job.hardware.device)
    redirect_output(run.rank_log(arguments.attempt, arguments.node, world.rank))
    quiet_libraries()
    print(f"rank {world.rank} of {world.world_size} on {socket.gethostname()}, {world.device}", flush=True)
    training = resolved.job.training
    pulse = Pulse(
        run,
        attempt=arguments.attempt,
        rank=world.rank,
        node=arguments.node,
        hang_timeout_s=training.hang_timeout_s,
        stalled=StallReport(run, attempt=arguments.attempt, rank=world.rank, node=arguments.node),
        # Before the watchdog ends the ranks, or the time-out of the collective does.
        stalled_after_s=min(training.hang_timeout_s, training.ddp_timeout_s) / 2,
    ).start()
    failure_json = run.rank_failure_json(arguments.attempt, world.rank)
    with (
        failure_recorded(failure_json, rank=world.rank, node=arguments.node),
        process_group(world, timeout_s=training.ddp_timeout_s),
    ):
        clock.mark("process_group")
        train(run, resolved, world, attempt=arguments.attempt, pulse=pulse, clock=clock)


def train(run: RunDir, resolved: ResolvedJob, world: World, *, attempt: int, pulse: Pulse, clock: StartClock) -> None:
    """Train, evaluate and export the model; on a stop request save it at a step boundary.

    Every event is in metrics.jsonl.
    """
    job = resolved.job
    metrics = MetricsLog(
        run, attempt=attempt, is_main=world.is_main, effective_batch_size=resolved.effective_batch_size
    )
    checkpoint = _find_checkpoint(run, job, world, metrics)
    clock.mark("resume")
    split = _load_split(run, job, world, metrics, resumes=checkpoint is not None)
    if world.is_main:
        accepts = job.restart.accept_changed_data
        if changed := note_samples(run, split, resumes=checkpoint is not None, accepts_change=accepts):
            metrics.log(f"warning: {changed}")
    clock.mark("index")
    tokenizer = load_job_tokenizer(job, split)
    trainer = _build_trainer(
        run, resolved, world, split=split, tokenizer=tokenizer, metrics=metrics, pulse=pulse, clock=clock
    )
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    step = trainer.state.global_step
    if trainer.is_stopping and step < trainer.state.max_steps:
        metrics.append(StopEvent(step=step, checkpoint=str(run.checkpoints / f"checkpoint-{step}")))
        metrics.log(f"stopped on purpose after step {step} of {trainer.state.max_steps}")
        return
    _evaluate_at_the_end(trainer, metrics)
    if job.checkpoint.export:
        pulse.beat("export", step)
        for folder in write_exports(run, trainer=trainer, tokenizer=tokenizer, job=job, world=world):
            metrics.log(f"export {folder}")
        metrics.append(ExportEvent(step=step, path=str(run.export)))
    metrics.append(CompleteEvent(step=step, total_steps=trainer.state.max_steps))


def _build_trainer(
    run: RunDir,
    resolved: ResolvedJob,
    world: World,
    *,
    split: SampleSplit,
    tokenizer: Any,
    metrics: MetricsLog,
    pulse: Pulse,
    clock: StartClock,
) -> JanusTrainer:
    """The trainer of this rank's model and data. Raises: JanusError for samples or weights that cannot be used."""
    job = resolved.job
    # Before the model is built: a sample that is too long is found in seconds, one that is held out too.
    batches = build_batches(job, split.train, tokenizer, world)
    load_token_counts(
        split.held_out, tokenizer=tokenizer, data=job.data, share=share_among(world), what="held-out samples"
    )
    clock.mark("tokens")

    ds_config_json = run.bundle(resolved.bundle).ds_config_json
    training_arguments = build_training_arguments(
        job, output_dir=run.checkpoints, ds_config_json=ds_config_json, device=job.hardware.device
    )
    model = build_job_model(job, tokenizer, world)
    if (random_head := why_head_is_random(job.model, job.training)) is not None:
        metrics.log(f"warning: action head: {random_head}: it is neither scored nor exported")
    metrics.log(render_parameter_groups(parameter_groups(model, job.training)))
    clock.mark("weights")

    dataset = partial(
        NavigationDataset, tokenizer=tokenizer, data=job.data, segment_weights=job.training.segment_weights
    )
    trainer = JanusTrainer(
        model=model,
        args=training_arguments,
        job=job,
        world=world,
        metrics=metrics,
        train_dataset=dataset(split.train),
        batches=batches,
        data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id),
        eval_dataset=dataset(split.held_out),
        pulse=pulse,
        head_not_scored=random_head,
    )
    trainer.add_callback(LogStart(clock, metrics))
    trainer.add_callback(
        MemoryWatch(
            metrics=metrics, pulse=pulse, memory=resolved.memory, device=world.device, resume=command_for("resume", run)
        )
    )
    return trainer


def _find_checkpoint(run: RunDir, job: JobConfig, world: World, metrics: MetricsLog) -> Path | None:
    """The checkpoint that all ranks resume from, if any; broken newer ones are reported."""
    found = agree_on_resume(run.checkpoints, resume=job.checkpoint.resume, world=world, report=metrics.log)
    for broken in found.passed_over:
        metrics.append(CheckpointBrokenEvent(step=broken.step, path=str(broken.path), reason=broken.reason))
    checkpoint = found.checkpoint
    if checkpoint is not None:
        metrics.append(ResumeEvent(step=step_of(checkpoint), checkpoint=str(checkpoint)))
        metrics.log(f"resuming from {checkpoint}")
    return checkpoint


def _load_split(run: RunDir, job: JobConfig, world: World, metrics: MetricsLog, *, resumes: bool) -> SampleSplit:
    """The samples to train on and those held out, the same on every rank and in every attempt after a checkpoint."""
    split = load_samples(
        job.data,
        seed=job.training.seed,
        pad_history=job.compat == "predecessor",
        index_dir=Path(job.data.index_dir) if job.data.index_dir else run.data_index,
        share=share_among(world),
        bad_data=run.bad_data_jsonl,
        reporter=Reporter(report=metrics.log),
        # Rank 0 splits for all, and is the one that writes this file anew.
        earlier=load_earlier_split(run) if resumes and world.is_main else None,
    )
    metrics.log(split.describe())
    if (warning := warn_of_leak(split.split, run)) is not None:
        metrics.log(f"warning: {warning}")
    return split


def _evaluate_at_the_end(trainer: JanusTrainer, metrics: MetricsLog) -> None:
    """The log ends with the scores of the last step, or with why there are none."""
    if trainer.evaluated_step != trainer.state.global_step:
        trainer.evaluate()
    if trainer.held_out_scores is not None:
        metrics.log(render_score_table(trainer.held_out_scores))
    else:
        metrics.log("no held-out samples (data.validation_fraction): accuracy was not measured")


def quiet_libraries() -> None:
    """The rank's log holds our lines and real warnings: no progress bars, no repeated notes on DeepSpeed's insides."""
    transformers_logging.disable_progress_bar()
    # Loader workers are forked after texts were tokenised: tokenizers' threads would not live on in them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.")
    # "Gradient accumulation steps mismatch … 1": the Trainer sets 1 there on purpose and accumulates itself.
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)


def load_job_tokenizer(job: JobConfig, split: SampleSplit) -> Any:
    """The tokenizer of model.path; the tiny preset's is made of the job's own texts, the same on every rank.

    Raises: UsageError where a preset needs weights and model.path is not set.
    """
    if job.model.path is not None:
        return load_tokenizer(job.model.path)
    if job.model.preset == "tiny":
        return build_tiny_tokenizer(sample_texts([*split.train, *split.held_out]))
    raise UsageError(
        f"model.path is not set, and preset {job.model.preset} has no weights of its own",
        hint="--set model.path=/path/to/Qwen2.5-VL, or export MODEL_PATH",
    )


def build_job_model(job: JobConfig, tokenizer: Any, world: World) -> JanusModel:
    """The job's network, in the job's precision, with its frozen part on this rank's device."""
    return build_model(
        job.model,
        job.training,
        tokenizer_ids=tokenizer_ids(tokenizer),
        device=world.device,
        dtype=torch.bfloat16 if job.training.precision == "bf16" else torch.float32,
        seed=job.training.seed,
    )


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m janus_cluster.training", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--bundle", type=int, required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--node", required=True)
    return parser.parse_args(argv)
