"""Checkpoint files on disk, as far as they can be read without torch: names and shapes from safetensors headers.

A safetensors file begins with 8 bytes (length of the header, little endian) and a JSON header; the data follows without
gaps. A `.pt` is a pickle: torch_header.py.
Source: the safetensors format, https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SAFETENSORS_INDEX = "model.safetensors.index.json"
# The first that is there is taken; of whole file and index, both left by an earlier save, transformers takes the file.
WEIGHT_FILES = ("model.safetensors", SAFETENSORS_INDEX, "model.pt")
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
KEYS_SHOWN = 5
_PIECE_BYTES = 8 << 20
LFS_POINTER = b"version https://git-lfs"
IS_LFS_POINTER = "is a Git LFS pointer, not the file itself: git lfs pull where it was cloned, and copy it again"


class CheckpointProblem(ValueError):
    """A file that cannot be read as a checkpoint; the message names it."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor on disk."""

    file: Path
    shape: tuple[int, ...]


def find_weight_files(path: Path, *, any_name: bool = False) -> list[Path]:
    """The files that hold the weights of `path`: a file itself, or a folder's shards or whole file.

    any_name: without a file of a usual name, the only file of weights in the folder is the one.
    Raises: CheckpointProblem if there are none, or the index names a shard that is not there.
    """
    if path.is_file():
        if path.suffix != ".safetensors" and path.suffix not in TORCH_SUFFIXES:
            raise CheckpointProblem(f"{path}: neither .safetensors nor {', '.join(TORCH_SUFFIXES)}")
        return [path]
    if not path.is_dir():
        raise CheckpointProblem(f"{path}: no such file or folder")
    chosen = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
    if chosen is None and any_name:
        chosen = _only_weight_file(path)
    if chosen is None:
        raise CheckpointProblem(f"{path}: holds none of {', '.join(WEIGHT_FILES)}")
    if chosen.name == SAFETENSORS_INDEX:
        return [path / shard for shard in sorted(set(read_weight_map(chosen).values()))]
    return [chosen]


def _only_weight_file(folder: Path) -> Path | None:
    """None where there is no file of weights. Raises: CheckpointProblem naming them where there are several."""
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", *TORCH_SUFFIXES) and p.is_file())
    if len(files) > 1:
        raise CheckpointProblem(
            f"{folder}: holds none of {', '.join(WEIGHT_FILES)} but {len(files)} other files of weights "
            f"({render_names([p.name for p in files])}): give the path of the one that is meant"
        )
    return files[0] if files else None


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard, from `index`; every shard exists.

    Raises: CheckpointProblem if the index cannot be read, or names a shard that is not there.
    """
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
        absent = [shard for shard in shards if not (index.parent / shard).is_file()]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointProblem(f"{index}: not an index of shards: {error}") from error
    if absent:
        raise CheckpointProblem(f"{index}: names files that are not there: {render_names(absent)}")
    return dict(weight_map)


def read_safetensors_index(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, or of a folder of them, by name; only headers are read.

    Raises: CheckpointProblem naming the file that is missing, truncated or no safetensors, or the tensor that the
    index promises and its shard does not hold.
    """
    found: dict[str, StoredTensor] = {}
    for file in find_weight_files(path):
        if file.suffix in TORCH_SUFFIXES:
            raise CheckpointProblem(f"{file}: a model is loaded from .safetensors only")
        found |= {name: StoredTensor(file=file, shape=shape) for name, shape in read_header(file).items()}
    check_against_index(path, found)
    return found


def check_against_index(path: Path, found: Mapping[str, StoredTensor]) -> None:
    """Each shard of a folder holds what its index promises. Raises: CheckpointProblem naming the tensors."""
    index = path / SAFETENSORS_INDEX
    if not index.is_file() or (path / WEIGHT_FILES[0]).is_file():
        return
    absent = [
        f"{name} ({shard})"
        for name, shard in read_weight_map(index).items()
        if name not in found or found[name].file.name != Path(shard).name
    ]
    if absent:
        raise CheckpointProblem(f"{index}: {len(absent)} tensors are not in the file it names: {render_names(absent)}")


def read_header(file: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a safetensors file whose data is all there.

    Raises: CheckpointProblem naming the file: too short, no JSON header, or shorter than its header requires.
    """
    return {name: stretch.shape for name, stretch in _read_stretches(file).items()}


def hold_same_data(index: Mapping[str, StoredTensor], first: str, second: str) -> bool:
    """Whether two tensors of safetensors files agree in type, shape and every byte; read up to the first difference.

    Raises: CheckpointProblem if a file cannot be read.
    """
    one, other = (_read_stretches(index[name].file)[name] for name in (first, second))
    if (one.dtype, one.shape, one.num_bytes) != (other.dtype, other.shape, other.num_bytes):
        return False
    try:
        with index[first].file.open("rb") as a, index[second].file.open("rb") as b:
            a.seek(one.begin)
            b.seek(other.begin)
            for done in range(0, one.num_bytes, _PIECE_BYTES):
                size = min(_PIECE_BYTES, one.num_bytes - done)
                if a.read(size) != b.read(size):
                    return False
    except OSError as error:
        raise CheckpointProblem(f"{error.filename or index[first].file}: cannot be read: {error}") from error
    return True


@dataclass(frozen=True, kw_only=True)
class _Stretch:
    """Position of a tensor's data in its file, in bytes from the start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    num_bytes: int


def _read_stretches(file: Path) -> dict[str, _Stretch]:
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            prefix = opened.read(8)
            if prefix == LFS_POINTER[:8]:
                raise CheckpointProblem(f"{file}: {IS_LFS_POINTER}")
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointProblem(f"{file}: cannot be read: {size} bytes, no whole safetensors header in them")
            header = json.loads(opened.read(length))
        stretches = {
            name: _Stretch(
                dtype=str(values["dtype"]),
                shape=tuple(int(n) for n in values["shape"]),
                begin=8 + length + int(values["data_offsets"][0]),
                num_bytes=int(values["data_offsets"][1]) - int(values["data_offsets"][0]),
            )
            for name, values in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, CheckpointProblem):
            raise
        raise CheckpointProblem(f"{file}: cannot be read: {error}") from error
    end = max((stretch.begin + stretch.num_bytes for stretch in stretches.values()), default=8 + length)
    if size < end:
        raise CheckpointProblem(f"{file}: truncated: {size:,} bytes, its header promises {end:,}")
    return stretches


def is_lfs_pointer(file: Path) -> bool:
    """Whether a clone without Git LFS left its note in the place of `file`. Raises: OSError."""
    with file.open("rb") as opened:
        return opened.read(len(LFS_POINTER)) == LFS_POINTER


def find_problems(
    index: Mapping[str, StoredTensor],
    expected: Mapping[str, tuple[int, ...]],
    *,
    where: Path,
    name_on_disk: Callable[[str], str],
) -> list[str]:
    """One line for the missing tensors and one for the misshapen ones, naming file and key; none if all is well.

    `index` and `expected` have the same names; `name_on_disk` is the checkpoint's own name of a tensor.
    """
    problems = []
    missing = [name_on_disk(name) for name in expected if name not in index]
    if missing:
        there = f"; its names are {render_names(list(index))}" if len(missing) == len(expected) and index else ""
        problems.append(
            f"{where}: {len(missing)} of {len(expected)} tensors are missing: {render_names(missing)}{there}"
        )
    wrong = [
        f"{name_on_disk(name)} in {index[name].file.name} is {list(index[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in index and index[name].shape != shape
    ]
    if wrong:
        problems.append(f"{where}: {len(wrong)} tensors have another shape: {render_names(wrong)}")
    return problems


def render_names(names: Sequence[str]) -> str:
    """The first few, and a sign that there are more."""
    return ", ".join(names[:KEYS_SHOWN]) + (", …" if len(names) > KEYS_SHOWN else "")
