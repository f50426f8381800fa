"""Short trainings whose DeepSpeed engines are asked for the values they run with; started by torchrun from
test_engine_values.py.

Usage: torchrun … engine_values_worker.py OUT RUN_DIR…     (run folders as training_run.write_run_folder makes them)
Rank 0 writes to OUT, per name of a run folder: the live value of each key of its ds_config.json, and the
synchronisations of each micro-step by place. A job for GPUs runs on a fake one.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.state import AcceleratorState
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.comm import comm
from engine_values import live_values
from fake_device import FakeDevice
from transformers import TrainerCallback

from janus_cluster.janusvln.data.dataset import NavigationDataset, collate
from janus_cluster.janusvln.data.index import load_samples
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.bundle import load_resolved
from janus_cluster.training.batches import build_batches
from janus_cluster.training.entry import build_job_model, load_job_tokenizer
from janus_cluster.training.metrics import MetricsLog
from janus_cluster.training.trainer import JanusTrainer, build_training_arguments
from janus_cluster.training.world import World, load_world, process_group, run_and_leave


class CountSynchronisations(TrainerCallback):  # type: ignore[misc]
    """What the fake device counted, micro-step by micro-step."""

    def __init__(self) -> None:
        self.micro_steps: list[dict[str, int]] = []

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        device = get_accelerator()
        if isinstance(device, FakeDevice):
            self.micro_steps.append(dict(device.synchronised))
            device.synchronised.clear()

    on_step_end = on_substep_end


def measure(run: RunDir, world: World) -> dict[str, Any]:
    resolved = load_resolved(run.bundle(1))
    job, count = resolved.job, CountSynchronisations()
    set_accelerator(FakeDevice() if job.hardware.device == "cuda" else CPU_Accelerator())
    # DeepSpeed has one logger for all engines of a process, and no engine switches it off.
    comm.comms_logger.enabled = False
    split = load_samples(job.data, seed=0)
    tokenizer = load_job_tokenizer(job, split)
    arguments = build_training_arguments(
        job, output_dir=run.checkpoints, ds_config_json=run.bundle(1).ds_config_json, device="cpu"
    )
    arguments.save_strategy = "no"
    trainer = JanusTrainer(
        model=build_job_model(job, tokenizer, world),
        args=arguments,
        job=job,
        world=world,
        metrics=MetricsLog(run, attempt=1, is_main=world.is_main, effective_batch_size=resolved.effective_batch_size),
        train_dataset=NavigationDataset(
            split.train, tokenizer=tokenizer, data=job.data, segment_weights=job.training.segment_weights
        ),
        batches=build_batches(job, split.train, tokenizer, world),
        data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id),
    )
    trainer.add_callback(count)
    trainer.train()
    engine = trainer.model_wrapped
    config = json.loads(run.bundle(1).ds_config_json.read_text(encoding="utf-8"))
    found = {
        "values": live_values(engine, config),
        "micro_steps": count.micro_steps,
        # accelerate writes Infinity
        "prints_every": None if engine.steps_per_print() == float("inf") else engine.steps_per_print(),
    }
    engine.destroy()
    AcceleratorState._reset_state()
    return found


def main() -> None:
    out, folders = Path(sys.argv[1]), [Path(folder) for folder in sys.argv[2:]]
    world = load_world("cpu")
    with process_group(world, timeout_s=60):
        found = {folder.name: measure(RunDir(folder), world) for folder in folders}
        if world.is_main:
            out.write_text(json.dumps(found), encoding="utf-8")
        dist.barrier()


if __name__ == "__main__":
    run_and_leave(main)
