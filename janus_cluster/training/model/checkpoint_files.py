"""What a checkpoint on disk holds: names and shapes first, from the headers; tensors only when they are wanted."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SAFETENSORS_INDEX = "model.safetensors.index.json"
WHOLE_FILES = ("model.safetensors", "model.pt")
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
KEYS_SHOWN = 5


class CheckpointProblem(ValueError):
    """A file that cannot be read as a checkpoint; the message names it."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor on disk."""

    file: Path
    shape: tuple[int, ...]


def read_tensor_index(path: Path) -> dict[str, StoredTensor]:
    """Every tensor's name, file and shape, without reading weights from safetensors files.

    `path` is a file (*.safetensors, *.pt, *.bin), or a folder with model.safetensors, its shards or model.pt.
    Raises: CheckpointProblem if there is no such file, or it is broken.
    """
    found: dict[str, StoredTensor] = {}
    for file in _weight_files(path):
        shapes = _torch_shapes(file) if file.suffix in TORCH_SUFFIXES else _safetensors_shapes(file)
        found |= {name: StoredTensor(file=file, shape=shape) for name, shape in shapes.items()}
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


def find_problems(
    index: Mapping[str, StoredTensor],
    expected: Mapping[str, tuple[int, ...]],
    *,
    where: Path,
    name_on_disk: Callable[[str], str],
) -> list[str]:
    """One line for the missing tensors and one for the misshapen ones, naming file and key; none if all is well.

    `index` and `expected` have the same names; `name_on_disk` says how the checkpoint itself calls one.
    """
    problems = []
    missing = [name_on_disk(name) for name in expected if name not in index]
    if missing:
        problems.append(f"{where}: {len(missing)} of {len(expected)} tensors are missing: {_shown(missing)}")
    wrong = [
        f"{name_on_disk(name)} in {index[name].file.name} is {list(index[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in index and index[name].shape != shape
    ]
    if wrong:
        problems.append(f"{where}: {len(wrong)} tensors have another shape: {_shown(wrong)}")
    return problems


def _shown(names: list[str]) -> str:
    return ", ".join(names[:KEYS_SHOWN]) + (", …" if len(names) > KEYS_SHOWN else "")


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix != ".safetensors" and path.suffix not in TORCH_SUFFIXES:
            raise CheckpointProblem(f"{path}: neither .safetensors nor {', '.join(TORCH_SUFFIXES)}")
        return [path]
    if not path.is_dir():
        raise CheckpointProblem(f"{path}: no such file or folder")
    index = path / SAFETENSORS_INDEX
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointProblem(f"{index}: not an index of shards: {error}") from error
        absent = [shard for shard in shards if not (path / shard).is_file()]
        if absent:
            raise CheckpointProblem(f"{index}: names files that are not there: {_shown(absent)}")
        return [path / shard for shard in shards]
    for name in WHOLE_FILES:
        if (path / name).is_file():
            return [path / name]
    raise CheckpointProblem(f"{path}: holds none of {SAFETENSORS_INDEX}, {', '.join(WHOLE_FILES)}")


def _safetensors_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            return {name: tuple(opened.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointProblem(f"{file}: cannot be read: {error}") from error


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
