"""The trained model as a folder that from_pretrained loads, read back before it takes its name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from janus_cluster.errors import TrainingFailed
from janus_cluster.janusvln.data.tokenizer import load_tokenizer, write_processing_files
from janus_cluster.janusvln.model.janus import JanusModel
from janus_cluster.janusvln.model.load import vggt_tensors, write_vggt
from janus_cluster.janusvln.model.lora import merge_adapters
from janus_cluster.janusvln.model.write import (
    config_as_trained,
    name_for_disk,
    require_readable,
    require_same,
    write_weights,
)
from janus_cluster.job.schema import JobConfig
from janus_cluster.modelspec.check_weights import why_head_is_random
from janus_cluster.modelspec.weight_names import ACTION_HEAD_PREFIX
from janus_cluster.run.paths import RunDir
from janus_cluster.training.new_folder import new_folder
from janus_cluster.training.published import write_published
from janus_cluster.training.subject import write_preparation
from janus_cluster.training.trainer import JanusTrainer
from janus_cluster.training.world import World, from_main


def write_exports(run: RunDir, *, trainer: JanusTrainer, tokenizer: Any, job: JobConfig, world: World) -> list[Path]:
    """Write weights, tokenizer, chat template and image processor to run.export, in one step.

    With checkpoint.export_layout: janusvln, run.published_export holds the published layout.
    Every rank calls this: under ZeRO-3 the weights are gathered from all of them. Adapters are merged. VGGT is frozen,
    so its weights are added only where no file has them (the tiny preset's are random). An action head that was neither
    trained nor loaded is left out.
    Returns: the folders. Raises: TrainingFailed if what was written does not read back as the live weights.
    """
    folders = [run.export, *([run.published_export] if job.checkpoint.export_layout == "janusvln" else [])]
    state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    failure: Exception | None = None
    if world.is_main:
        try:
            with new_folder(run.export) as new:
                is_head_random = why_head_is_random(job.model, job.training) is not None
                write_model(
                    new,
                    trainer.model,
                    merge_adapters(state_dict, job.training.lora),
                    without=(ACTION_HEAD_PREFIX,) if is_head_random else (),
                )
                if job.model.vggt_path is None:
                    require_same(write_vggt(trainer.model, new), vggt_tensors(trainer.model))
                write_processing_files(new, tokenizer=tokenizer, data=job.data)
                load_tokenizer(new)
                write_preparation(new, job)
            for published in folders[1:]:
                write_published(run.export, published)
        except Exception as error:
            failure = error
    if from_main(world, lambda: failure is not None):
        # Not a cause of its own: a card must name the rank that wrote.
        raise failure or TrainingFailed("rank 0 could not write the export", is_follow_up=True)
    return folders


def write_model(
    folder: Path, model: JanusModel, state_dict: Mapping[str, Tensor], *, without: tuple[str, ...] = ()
) -> None:
    """`folder` holds configuration and weights of `model`, whose whole state is `state_dict`, and reads back as them.

    without: prefixes of modules whose weights mean nothing and are left out.
    Raises: TrainingFailed if it does not.
    """
    config = config_as_trained(model)
    named = name_for_disk(state_dict, config)
    tensors = {name: tensor for name, tensor in named.items() if not name.startswith(without)}
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    write_weights(folder, tensors)
    require_readable(folder, tensors, without=without)
