"""Tensors of a checkpoint on disk: names and shapes first, from the headers; weights only when they are wanted.

Who reads what: safetensors and .pt files are memory-mapped, so the ranks of a node share one copy in the page cache and
each file crosses the network once per node, whatever the number of ranks. Under ZeRO-3 only rank 0 reads Qwen's
weights, the other ranks only headers, and DeepSpeed broadcasts them (transformers does this).
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from janus_cluster.config.safetensors_header import (
    TORCH_SUFFIXES,
    CheckpointProblem,
    StoredTensor,
    check_against_index,
    find_weight_files,
    read_header,
)


def read_tensor_index(path: Path) -> dict[str, StoredTensor]:
    """Every tensor's name, file and shape, without reading weights from safetensors files.

    `path` is a file (*.safetensors, *.pt, *.bin), or a folder with model.safetensors, its shards or model.pt.
    Raises: CheckpointProblem if there is no such file, or it is broken.
    """
    found: dict[str, StoredTensor] = {}
    for file in find_weight_files(path):
        shapes = _torch_shapes(file) if file.suffix in TORCH_SUFFIXES else read_header(file)
        found |= {name: StoredTensor(file=file, shape=shape) for name, shape in shapes.items()}
    check_against_index(path, found)
    return found


def read_tensors(index: Mapping[str, StoredTensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The named tensors, on the CPU, each file opened once."""
    wanted: dict[Path, list[str]] = {}
    for name in names:
        wanted.setdefault(index[name].file, []).append(name)
    tensors: dict[str, Tensor] = {}
    for file, file_names in wanted.items():
        if file.suffix in TORCH_SUFFIXES:
            stored = _load_torch(file)
            tensors |= {name: stored[name] for name in file_names}
        else:
            with safe_open(file, framework="pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in file_names}
    return tensors


def _torch_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in _load_torch(file).items()}


def _load_torch(file: Path) -> dict[str, Tensor]:
    try:
        # weights_only: a .pt is a pickle, and must not run what it holds; mmap: a second reading costs nothing.
        stored = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointProblem(f"{file}: cannot be read as weights: {str(error).splitlines()[0]}") from error
    if not isinstance(stored, dict):
        raise CheckpointProblem(f"{file}: holds {type(stored).__name__}, not a state dict")
    return {name: value for name, value in stored.items() if isinstance(value, Tensor)}
