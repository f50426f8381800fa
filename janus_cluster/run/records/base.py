"""Record: a frozen dataclass that is a JSON file of the run folder. Its annotations are the check of what is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache, partial
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from janus_cluster.errors import JanusError
from janus_cluster.run.files import append_line, write_text_atomically

if TYPE_CHECKING:
    from typing_extensions import Self

# metadata of a field with a default: a value that is unfit makes the file a foreign one all the same.
STRICT: Mapping[str, bool] = {"strict": True}
_Read = Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True)
class Record:
    """Base of the types. A field without a default is required; one with a default has it where the file's is unfit.

    Keys that a type does not know are ignored.
    """

    # Written as the first key; a file with another number is of a foreign shape. None: the object has no such key.
    SCHEMA_VERSION: ClassVar[int | None] = 1
    # The one field that is the whole object, where the keys are not known beforehand.
    WHOLE: ClassVar[str | None] = None

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """What the file holds; None where it is absent, half-written, damaged or of a foreign shape."""
        try:
            return cls.read(path)
        except (OSError, ValueError):
            return None

    @classmethod
    def read(cls, path: Path) -> Self:
        """What the file holds. Raises: OSError, ValueError with what is wrong with it."""
        return cls.from_json(parse_json(path.read_bytes()))

    @classmethod
    def require(cls, path: Path, *, hint: str | None = None) -> Self:
        """What the file holds. Raises: JanusError that names the file and what is wrong with it."""
        try:
            return cls.read(path)
        except OSError as error:
            raise JanusError(f"{path}: {error.strerror or error}", hint=hint) from error
        except ValueError as error:
            raise JanusError(f"{path} cannot be used: {error}", hint=hint) from error

    def write(self, path: Path, *, mode: int = 0o644) -> None:
        """The file holds this record, or what it held before. Raises: OSError."""
        write_text_atomically(path, self.render(), mode=mode)

    def render(self) -> str:
        """The text of the file."""
        return _render(self.to_json(), indent=2) + "\n"

    @classmethod
    def load_lines(cls, path: Path) -> list[Self]:
        """The records of a file that `append` wrote; lines that hold none are left out. [] where there is no file."""
        try:
            lines = path.read_bytes().splitlines()
        except OSError:
            return []
        return [record for line in lines if (record := cls._load_line(line)) is not None]

    @classmethod
    def _load_line(cls, line: bytes) -> Self | None:
        try:
            return cls.from_json(parse_json(line))
        except ValueError:
            return None

    def append(self, path: Path) -> None:
        """The file has this record as one line more. Raises: OSError."""
        append_line(path, _render(self.to_json()))

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """The record that a JSON value is. Raises: ValueError with the key that is missing or of another type."""
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}, not an object")
        version = value.get("schema_version", cls.SCHEMA_VERSION)
        if cls.SCHEMA_VERSION is not None and version != cls.SCHEMA_VERSION:
            raise ValueError(f"schema_version is {version!r}, known is {cls.SCHEMA_VERSION}")
        if cls.WHOLE is not None:
            return cls(**{cls.WHOLE: {k: v for k, v in value.items() if k != "schema_version"}})
        found = {}
        for name, read, is_required, is_strict in _readers(cls):  # type: ignore[arg-type]
            if name not in value:
                if is_required:
                    raise ValueError(f"key {name} is missing")
                continue
            try:
                found[name] = read(value[name])
            except ValueError as error:
                if is_required or is_strict:
                    raise ValueError(f"key {name}: {error}") from error
        return cls(**found)

    def to_json(self) -> dict[str, Any]:
        """The object that `write` puts into the file."""
        version = {} if self.SCHEMA_VERSION is None else {"schema_version": self.SCHEMA_VERSION}
        if self.WHOLE is not None:
            whole: dict[str, Any] = _plain(getattr(self, self.WHOLE))
            return version | whole
        return version | {field.name: _plain(getattr(self, field.name)) for field in fields(self)}


def parse_json(data: bytes | str) -> Any:
    """The JSON value. Raises: ValueError."""
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


@cache
def _readers(cls: type[Any]) -> list[tuple[str, _Read, bool, bool]]:
    """(name, what makes the field's value of a JSON value, whether it is required, whether strict) of every field."""
    hints = get_type_hints(cls)
    return [
        (field.name, _reader(hints[field.name]), _is_required(field), "strict" in field.metadata)
        for field in fields(cls)
    ]


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _reader(hint: Any) -> _Read:
    """What makes a value of the annotated type; it raises ValueError for one that is none."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return _same
    if origin is Literal:
        return partial(_read_literal, args)
    if origin in (Union, UnionType):
        return partial(_read_union, [_reader(arg) for arg in args])
    if origin is tuple:
        return partial(_read_list, _reader(args[0]))
    if hint in (dict, Mapping) or origin in (dict, Mapping):
        return partial(_read_object, _reader(args[1] if args else Any))
    if hint is Path:
        return _read_path
    if hint is float:
        return partial(_read_simple, (int, float), float)
    if isinstance(hint, type) and issubclass(hint, Record):
        return hint.from_json
    return partial(_read_simple, (hint,), _same)


def _same(value: Any) -> Any:
    return value


def _read_simple(types: tuple[type, ...], make: _Read, value: Any) -> Any:
    # In Python a bool is an int, in JSON it is not.
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise ValueError(f"{value!r:.80} is no {types[-1].__name__ if types[-1] is not NoneType else 'null'}")
    try:
        return make(value)
    except OverflowError as error:
        raise ValueError("it is too large a number") from error


def _read_literal(allowed: tuple[Any, ...], value: Any) -> Any:
    if value not in allowed:
        raise ValueError(f"{value!r:.80} is none of {', '.join(map(str, allowed))}")
    return value


def _read_union(readers: list[_Read], value: Any) -> Any:
    problems = []
    for read in readers:
        try:
            return read(value)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError(problems[0])


def _read_list(read: _Read, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r:.80} is no list")
    return tuple(read(item) for item in value)


def _read_object(read: _Read, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r:.80} is no object")
    return {key: read(item) for key, item in value.items()}


def _read_path(value: Any) -> Path:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r:.80} is no path")
    return Path(value)


def _render(value: Any, *, indent: int | None = None) -> str:
    """JSON; a byte of a file's name that is no UTF-8 as \\udcXX, which is JSON's own way to write it."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _plain(value: Any) -> Any:
    """The value as JSON has it."""
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
