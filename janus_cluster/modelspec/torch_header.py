"""Names and shapes of a `.pt`, `.pth` or `.bin`, read without torch and without running what the pickle holds.

torch.save writes a pickle beside its storages: a zip (data.pkl, data/0, …), or in torch's form before 1.6 four pickles
and the storages behind them in one stream. Every global of a pickle resolves to a dummy of this file, so nothing is
imported or called; a global that torch.load(weights_only=True) would refuse makes the file refused here too.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from janus_cluster.modelspec.safetensors_header import IS_LFS_POINTER, CheckpointProblem, is_lfs_pointer

TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_MOST_PICKLE_BYTES = 100_000_000
# An optimizer's state is three levels deep; networks are not saved deeper.
_MOST_LEVELS = 4
_TORCH_MODULES = ("torch", "torch._utils", "torch._tensor", "torch.storage", "torch.serialization", "torch.cuda")
_PLAIN = {("collections", "OrderedDict"), ("collections", "Counter"), ("builtins", "set"), ("builtins", "bytearray"),
          ("builtins", "complex"), ("_codecs", "encode"), ("torch.nn.parameter", "Parameter")}  # fmt: skip
_ITEM_BYTES = {
    "DoubleStorage": 8, "LongStorage": 8, "FloatStorage": 4, "IntStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2,
    "ShortStorage": 2,
}  # fmt: skip
# What a pickle raises that is cut or was never one.
_BROKEN = (pickle.UnpicklingError, EOFError, OSError, ValueError, TypeError, KeyError, IndexError, AttributeError,
           RecursionError, OverflowError, zipfile.BadZipFile, NotImplementedError)  # fmt: skip


def read_torch_header(file: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, names of nested dictionaries joined by dots ("model.aggregator.…").

    Raises: CheckpointProblem naming the file: cut, no checkpoint of torch's, or with more in it than tensors.
    """
    try:
        if is_lfs_pointer(file):
            raise CheckpointProblem(f"{file}: {IS_LFS_POINTER}")
        reader, stored = _read_zip(file) if zipfile.is_zipfile(file) else _read_stream(file)
        shapes = dict(flatten(stored, lambda value: isinstance(value, _Tensor)))
    except _BROKEN as error:
        if isinstance(error, CheckpointProblem):
            raise
        raise CheckpointProblem(f"{file}: cannot be read as weights: {error or type(error).__name__}") from error
    if reader.foreign:
        what = "a whole pickled module" if isinstance(stored, _Other) else "more than tensors"
        raise CheckpointProblem(
            f"{file}: holds {what} ({', '.join(sorted(reader.foreign)[:3])}), which is not loaded, since it could run "
            "code: save its state_dict() alone"
        )
    if not isinstance(stored, dict):
        raise CheckpointProblem(f"{file}: holds no state dict")
    return {name: tensor.shape for name, tensor in shapes.items()}


def flatten(
    stored: Any, is_tensor: Callable[[Any], bool], prefix: str = "", level: int = 0
) -> Iterator[tuple[str, Any]]:
    """Every tensor in nested dictionaries, with the keys on the way to it joined by dots."""
    if isinstance(stored, Mapping) and level <= _MOST_LEVELS:
        for key, value in stored.items():
            if is_tensor(value):
                yield f"{prefix}{key}", value
            else:
                yield from flatten(value, is_tensor, f"{prefix}{key}.", level + 1)


def _read_zip(file: Path) -> tuple[_Reader, Any]:
    with zipfile.ZipFile(file) as opened:
        sizes = {entry.filename: entry.file_size for entry in opened.infolist()}
        pickled = next((name for name in sizes if name.endswith("/data.pkl")), None)
        if pickled is None or sizes[pickled] > _MOST_PICKLE_BYTES:
            raise ValueError("a zip without data.pkl" if pickled is None else f"{pickled} is too large")
        with opened.open(pickled) as stream:
            reader = _Reader(stream)
            stored = reader.load()
    folder = pickled.removesuffix("data.pkl") + "data/"
    short = [key for key, size in reader.storage_bytes.items() if sizes.get(folder + key, 0) < size]
    if short:
        raise ValueError(f"{len(short)} of {len(reader.storage_bytes)} storages are missing or cut")
    return reader, stored


def _read_stream(file: Path) -> tuple[_Reader, Any]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if not size or _Reader(stream).load() != TORCH_MAGIC:
            raise ValueError(f"{size:,} bytes, neither a whole zip nor a pickle of torch's")
        for _ in ("protocol", "machine"):
            _Reader(stream).load()
        reader = _Reader(stream)
        stored = reader.load()
    if size < (needed := sum(reader.storage_bytes.values())):
        raise ValueError(f"{size:,} bytes, its tensors take {needed:,}")
    return reader, stored


class _Tensor:
    """A tensor's shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape


class _Other:
    """Stub for an object that is no tensor: accepts every pickle operation and does nothing."""

    def __init__(self, *_args: Any, **_options: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass

    def __setitem__(self, _key: Any, _value: Any) -> None:
        pass

    def append(self, _value: Any) -> None:
        """A pickled list's subclass."""


class _Dict(dict[Any, Any]):
    """An OrderedDict; state_dict() gives it attributes, which are dropped."""

    def __setstate__(self, _state: Any) -> None:
        pass


class _Reader(pickle.Unpickler):
    """One pickle of torch's. `foreign` are the names in it that have no business in a state dict."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream)
        self.foreign: set[str] = set()
        self.storage_bytes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        """A stub for the class or function of that name."""
        if name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return _rebuild_tensor
        if name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return _first
        if name == "_rebuild_from_type_v2":
            return _rebuild_from_type
        if (module, name) == ("collections", "OrderedDict"):
            return _Dict
        if (module, name) == ("torch", "Size"):
            return tuple
        if module not in _TORCH_MODULES and (module, name) not in _PLAIN:
            self.foreign.add(f"{module}.{name}")
        return type(name, (_Other,), {})

    def persistent_load(self, pid: Any) -> Any:
        """A storage: its kind, key and length are noted."""
        _, kind, key, _, count = pid[:5]
        self.storage_bytes[str(key)] = int(count) * _ITEM_BYTES.get(getattr(kind, "__name__", ""), 1)
        return None


def _rebuild_tensor(_storage: Any, _offset: Any, shape: Any, *_rest: Any) -> _Tensor:
    return _Tensor(tuple(int(n) for n in shape))


def _first(value: Any, *_rest: Any) -> Any:
    return value


def _rebuild_from_type(build: Any, _type: Any, arguments: Any, _state: Any) -> Any:
    return build(*arguments) if build in (_rebuild_tensor, _first) else _Other()
