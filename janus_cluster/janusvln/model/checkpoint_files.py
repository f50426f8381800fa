"""Tensors of a checkpoint on disk, once their names and shapes are known from the headers (modelspec/vggt_source.py).

Who reads what: safetensors and .pt files are memory-mapped, so the ranks of a node share one copy in the page cache and
each file crosses the network once per node, whatever the number of ranks. Under ZeRO-3 only rank 0 reads Qwen's
weights, the other ranks only headers, and DeepSpeed broadcasts them (transformers does this).
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from janus_cluster.modelspec.safetensors_header import TORCH_SUFFIXES, CheckpointProblem, StoredTensor
from janus_cluster.modelspec.torch_header import flatten


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


def _load_torch(file: Path) -> dict[str, Tensor]:
    """Under the names that read_torch_header gives them."""
    try:
        # weights_only: a .pt is a pickle, and must not run what it holds; mmap: a second reading costs nothing, but
        # torch's form before 1.6 has none.
        stored = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointProblem(f"{file}: cannot be read as weights: {str(error).splitlines()[0]}") from error
    return dict(flatten(stored, lambda value: isinstance(value, Tensor)))
