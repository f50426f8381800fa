"""One step of training under every ZeRO stage and an export of each, in one process; started by test_export.py.

Usage: export_worker.py EPISODES OUT
OUT/<stage>-<full|lora>-<preset|path>-<tied|untied>/ holds `export/` and `live.safetensors`: what the trained network
itself computes for OUT/batch.pt. A run with model.path begins at the export that the preset gave under ZeRO-0;
OUT/<stage>-full-path-flagged/ at the untied one with a tied flag in config.json.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from torch import Tensor, nn
from training_run import free_port, write_run_folder
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from janus_cluster.janusvln.data.dataset import NavigationDataset, collate
from janus_cluster.janusvln.data.index import load_samples
from janus_cluster.janusvln.held_out import move_to
from janus_cluster.janusvln.model.janus import JanusModel
from janus_cluster.job.schema import JobConfig
from janus_cluster.modelspec.networks import PRESETS
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.bundle import load_resolved
from janus_cluster.training.batches import build_batches
from janus_cluster.training.entry import build_job_model, load_job_tokenizer
from janus_cluster.training.export import write_exports
from janus_cluster.training.metrics import MetricsLog
from janus_cluster.training.trainer import JanusTrainer, build_training_arguments
from janus_cluster.training.world import World

STAGES = ("zero0", "zero1", "zero2", "zero3")
ADAPTERS = ("full", "lora")
SOURCES = ("preset", "path")
HEADS = ("tied", "untied")
CASES = [
    *itertools.product(STAGES, ADAPTERS, SOURCES[:1], HEADS),
    *itertools.product(STAGES, ADAPTERS, SOURCES[1:], HEADS),
    *(("zero2", "full", "path", "flagged"), ("zero3", "full", "path", "flagged")),
]
WORLD = World(0, 0, 1, torch.device("cpu"))


def name_of(stage: str, adapter: str, source: str, head: str) -> str:
    return f"{stage}-{adapter}-{source}-{head}"


def first_stage(out: Path, head: str) -> Path:
    """The export at which runs with model.path begin."""
    if head != "flagged":
        return out / name_of("zero0", "full", "preset", head) / "export"
    folder = out / "flagged"
    if not folder.exists():
        shutil.copytree(first_stage(out, "untied"), folder)
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": True}), encoding="utf-8")
    return folder


def job_for(episodes: Path, out: Path, *, stage: str, adapter: str, source: str, head: str) -> dict[str, Any]:
    path = str(first_stage(out, head)) if source == "path" else None
    return {
        "nodes": 1,
        "model": {"preset": "tiny", "path": path},
        "data": {
            "roots": [str(episodes)], "history": 0, "image_width": 84, "min_pixels": 784, "num_workers": 0,
            "validation_fraction": 0,
        },
        "training": {
            "per_device_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 1, "warmup_ratio": 0,
            "learning_rate": 1e-2, "projector_learning_rate": 1e-2, "precision": "fp32",
            "gradient_checkpointing": False, "lora": {"enabled": adapter == "lora"},
        },
        "deepspeed": {"profile": stage},
    }  # fmt: skip


def logits_of(engine: nn.Module, model: JanusModel, batch: dict[str, Any]) -> dict[str, Tensor]:
    """The text and action logits of `model`, called through `engine`."""
    logged: list[Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda _head, _inputs, logits: logged.append(logits))
    with torch.no_grad():
        output = engine(**batch)
    hook.remove()
    return {"text": logged[0].clone(), "action": output.action_logits.clone()}


def train_and_export(run: RunDir, job: JobConfig, *, tied: bool) -> None:
    """run.path holds export/ and live.safetensors."""
    # The only network without weights on disk is untied; a run without model.path may be either here.
    PRESETS["tiny"] = replace(PRESETS["tiny"], tie_word_embeddings=tied)
    split = load_samples(job.data, seed=0)
    tokenizer = load_job_tokenizer(job, split)
    arguments = build_training_arguments(
        job, output_dir=run.checkpoints, ds_config_json=run.bundle(1).ds_config_json, device="cpu"
    )
    arguments.save_strategy = "no"
    dataset = NavigationDataset(
        split.train, tokenizer=tokenizer, data=job.data, segment_weights=job.training.segment_weights
    )
    collate_rows = partial(collate, pad_token_id=tokenizer.pad_token_id)
    trainer = JanusTrainer(
        model=build_job_model(job, tokenizer, WORLD),
        args=arguments,
        job=job,
        world=WORLD,
        metrics=MetricsLog(run, attempt=1, is_main=True, effective_batch_size=1),
        train_dataset=dataset,
        batches=build_batches(job, split.train, tokenizer, WORLD),
        data_collator=collate_rows,
    )
    trainer.train()
    batch = move_to(collate_rows([dataset[0]]), torch.device("cpu"))
    trainer.model_wrapped.eval()
    save_file(logits_of(trainer.model_wrapped, trainer.model, batch), run.path / "live.safetensors")
    torch.save(batch, run.path.parent / "batch.pt")
    write_exports(run, trainer=trainer, tokenizer=tokenizer, job=job, world=WORLD)


def main(episodes: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    for stage, adapter, source, head in CASES:
        folder = out / name_of(stage, adapter, source, head)
        job = job_for(episodes, out, stage=stage, adapter=adapter, source=source, head=head)
        run = write_run_folder(folder, job)
        resolved = load_resolved(run.bundle(1))
        train_and_export(run, resolved.job, tied=head == "tied")
        # Both are kept for the life of a process; here another stage comes next.
        AcceleratorState._reset_state(reset_partial_state=True)
        unset_hf_deepspeed_config()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
