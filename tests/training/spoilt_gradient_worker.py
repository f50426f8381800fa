"""A short training whose second step has a finite loss and a gradient that is no number.

Usage: torchrun … spoilt_gradient_worker.py RUN_DIR     (a run folder as training_run.write_run_folder makes it)
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

from janus_cluster.janusvln.data.dataset import NavigationDataset, collate
from janus_cluster.janusvln.data.index import load_samples
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.bundle import load_resolved
from janus_cluster.training.batches import build_batches
from janus_cluster.training.entry import build_job_model, load_job_tokenizer
from janus_cluster.training.failure import failure_recorded
from janus_cluster.training.metrics import MetricsLog
from janus_cluster.training.trainer import JanusTrainer, build_training_arguments
from janus_cluster.training.world import load_world, process_group, run_and_leave


class SpoiltTrainer(JanusTrainer):
    """The root of 0 is 0, and its slope is not finite."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.state.global_step == 1:
            learns = next(p for p in model.parameters() if p.requires_grad)
            loss = loss + (learns.sum() * 0).sqrt()
        return loss


def main() -> None:
    run = RunDir(Path(sys.argv[1]))
    resolved = load_resolved(run.bundle(1))
    job, world = resolved.job, load_world("cpu")
    failure_json = run.rank_failure_json(1, world.rank)
    with failure_recorded(failure_json, rank=world.rank, node="a"), process_group(world, timeout_s=60):
        split = load_samples(job.data, seed=0)
        tokenizer = load_job_tokenizer(job, split)
        arguments = build_training_arguments(
            job, output_dir=run.checkpoints, ds_config_json=run.bundle(1).ds_config_json, device="cpu"
        )
        trainer = SpoiltTrainer(
            model=build_job_model(job, tokenizer, world),
            args=arguments,
            job=job,
            world=world,
            metrics=MetricsLog(run, attempt=1, is_main=world.is_main, effective_batch_size=4),
            train_dataset=NavigationDataset(
                split.train, tokenizer=tokenizer, data=job.data, segment_weights=job.training.segment_weights
            ),
            batches=build_batches(job, split.train, tokenizer, world),
            data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id),
        )
        trainer.train()


if __name__ == "__main__":
    run_and_leave(main)
