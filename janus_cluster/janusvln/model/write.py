"""The network's weights -> files under the hub's names: one way for every ZeRO stage, adapter and precision.

transformers' own way back from its names depends on how the model was made: under ZeRO-3, from model.path, it writes
`model.model.…`, and readers then initialise the language model at random without an error.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from janus_cluster.errors import TrainingFailed, UsageError
from janus_cluster.janusvln.model.checkpoint_files import read_tensors
from janus_cluster.janusvln.model.janus import JanusConfig, JanusModel
from janus_cluster.modelspec.check_weights import expected_shapes, judge_model_weights, load_config_values
from janus_cluster.modelspec.safetensors_header import (
    SAFETENSORS_INDEX,
    CheckpointProblem,
    find_problems,
    read_safetensors_index,
    render_names,
)
from janus_cluster.modelspec.weight_names import EMBEDDING, HEAD, declares_tied, janus_shapes, name_on_disk

# As the hub's own files: who writes or copies one holds no more than this in memory.
SHARD_SIZE = "5GB"
_SAMPLED = 48


def config_as_trained(model: JanusModel) -> JanusConfig:
    """The network's configuration, tied where the head is the embedding, with the weights' type."""
    config: JanusConfig = copy.deepcopy(model.config)
    is_tied = model.lm_head.weight is model.get_input_embeddings().weight
    for part in (config, config.text_config):
        if hasattr(part, "tie_word_embeddings"):
            part.tie_word_embeddings = is_tied
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [JanusModel.__name__]
    return config


def name_for_disk(state_dict: Mapping[str, Tensor], config: JanusConfig) -> dict[str, Tensor]:
    """Every weight of a network of `config` under its name on disk, and nothing else.

    The network's own names are those of transformers 5, under any wrapper.
    Raises: TrainingFailed naming what is not there or has another shape.
    """
    shapes = janus_shapes(config.to_dict())
    problems = [
        f"{name} is {list(state_dict[name].shape) if name in state_dict else 'not there'}, not {list(shape)}"
        for name, shape in shapes.items()
        if name not in state_dict or tuple(state_dict[name].shape) != shape
    ]
    spare = [name for name in state_dict if name not in shapes and name != HEAD]
    problems += [f"{name} is none of the network's weights" for name in spare]
    if problems:
        raise TrainingFailed(f"the export cannot be written: {len(problems)} weights: {render_names(problems)}")
    return {name_on_disk(name): state_dict[name] for name in shapes}


def write_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """folder/model.safetensors, or shards with their index, hold `tensors` under these names."""
    split = split_torch_state_dict_into_shards(
        dict(tensors), filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_SIZE
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name].contiguous() for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def require_readable(folder: Path, tensors: Mapping[str, Tensor], *, without: tuple[str, ...] = ()) -> None:
    """Require that a model's `folder` reads back as what was written, its head too, and could be model.path.

    `tensors` by their names on disk: the live weights, but for those of the modules `without`.
    Raises: TrainingFailed naming what is otherwise.
    """
    require_same(folder, tensors)
    try:
        values = load_config_values(folder)
        report = judge_model_weights(read_safetensors_index(folder), expected_shapes(values, folder), where=folder)
    except (CheckpointProblem, UsageError) as error:
        raise _unreadable([str(error)]) from error
    problems = [
        f"{folder}: {module}* would be initialised at random" for module in report.new_modules if module not in without
    ]
    if declares_tied(values) == (HEAD in tensors):
        problems.append(
            f"{folder}/config.json: tie_word_embeddings is {declares_tied(values)}, the network is otherwise"
        )
    if problems:
        raise _unreadable(problems)


def require_same(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """The file or folder holds these tensors and no others: names, shapes, and of every 1/48th all numbers.

    Raises: TrainingFailed naming what is otherwise.
    """
    try:
        index = read_safetensors_index(path)
    except CheckpointProblem as error:
        raise _unreadable([str(error)]) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = find_problems(index, shapes, where=path, name_on_disk=str)
    if spare := [name for name in index if name not in tensors]:
        problems.append(f"{path}: {len(spare)} tensors that were not written: {render_names(spare)}")
    if not problems:
        sample = _draw_sample(tensors)
        read = read_tensors(index, sample)
        changed = [name for name in sample if _hash(read[name]) != _hash(tensors[name])]
        problems = [f"{path}: {len(changed)} tensors are other numbers: {render_names(changed)}"] if changed else []
    if problems:
        raise _unreadable(problems)


def _draw_sample(tensors: Mapping[str, Tensor]) -> list[str]:
    names = sorted(tensors)
    step = max(1, len(names) // _SAMPLED)
    return sorted({*names[::step], *({HEAD, name_on_disk(EMBEDDING)} & tensors.keys())})


def _hash(tensor: Tensor) -> tuple[Any, ...]:
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return tensor.dtype, hashlib.sha256(data).hexdigest()


def _unreadable(problems: list[str]) -> TrainingFailed:
    return TrainingFailed(
        f"the export was written and cannot be read back: {'; '.join(problems)}",
        hint="the run's last checkpoint is as it was: `janus-cluster resume` writes the export again from it",
    )
