"""Data sets that are one file with a list of records: .json, .jsonl, .json.gz, .jsonl.gz.

What a record is, its fields say; a root's `format` allows one kind only. The trajectories' train.json.gz holds its list
under "episodes".
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from janus_cluster.errors import UsageError
from janus_cluster.training.data.formats import annotation, json_samples, trajectories
from janus_cluster.training.data.formats.source import (
    AbsentError,
    BadUnitError,
    Record,
    Source,
    load_json,
)
from janus_cluster.training.data.store import Collector

ReadRecord = Callable[[Source, Record, str, Collector], None]


class Kind(NamedTuple):
    """One kind of record: its name in `format`, how it is told, and who reads it."""

    name: str
    claims: Callable[[Record], bool]
    read: ReadRecord


# The first that claims a record reads it.
KINDS = (
    Kind("annotation", annotation.claims, annotation.read_record),
    Kind("trajectories", trajectories.claims, trajectories.read_record),
    Kind("json", json_samples.claims, json_samples.read_record),
)


class RecordFile:
    """A unit is (number of the record, the record as parsed, or the text of a broken line)."""

    def list_units(self, source: Source, collector: Collector) -> Sequence[tuple[int, Any]]:
        """Every record of the file."""
        try:
            if ".jsonl" in source.path.suffixes:
                return _load_lines(source.path)
            value = load_json(source.path)
            if isinstance(value, dict) and isinstance(value.get("episodes"), list):
                value = value["episodes"]
            if not isinstance(value, list):
                raise BadUnitError(f"holds a {type(value).__name__}, expected a list of records")
        except BadUnitError as error:
            raise UsageError(
                f"data.roots: {source.path} {error}",
                hint="a data set that cannot be read at all is refused; mend it, or take it out of data.roots",
            ) from error
        return list(enumerate(value))

    def read_unit(self, source: Source, unit: tuple[int, Any], collector: Collector) -> None:
        """The record's samples are kept."""
        number, record = unit
        label = f"{source.path.name}#{number}"
        try:
            if isinstance(record, BrokenLine):
                raise BadUnitError(record.reason)
            if not isinstance(record, Mapping):
                raise BadUnitError(f"is a {type(record).__name__}, expected an object")
            kind_of(record, source.format).read(source, record, label, collector)
        except AbsentError as error:
            collector.absent(
                error.folder,
                f"is absent: record {number} of {source.path} has no folder of frames",
                language=trajectories.language_of(record),
            )
        except (BadUnitError, OSError) as error:
            collector.problem(source.path, f"record {number}: {error}", lost=1)


class BrokenLine(NamedTuple):
    """A line of a .jsonl file that is no JSON."""

    reason: str


def kind_of(record: Record, wanted: str) -> Kind:
    """The kind of a record, of those that a root's `format` allows. Raises: BadUnitError."""
    for kind in KINDS:
        if wanted in ("auto", kind.name) and kind.claims(record):
            return kind
    known = "conversations; video and actions; episode_id and instruction; or images and action"
    asked = "" if wanted == "auto" else f" of format {wanted}"
    raise BadUnitError(
        f"is no record{asked}: expected {known}, found {', '.join(map(str, list(record)[:12])) or 'nothing'}"
    )


def _load_lines(path: Path) -> list[tuple[int, Any]]:
    """Lines with something in them, each parsed by itself."""
    try:
        raw = path.read_bytes()
        text = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise BadUnitError(f"cannot be read ({error})") from error
    units: list[tuple[int, Any]] = []
    for number, line in enumerate(text.split(b"\n")):
        if line.strip():
            try:
                units.append((number, json.loads(line.decode("utf-8-sig"))))
            except (ValueError, RecursionError) as error:
                units.append((number, BrokenLine(f"cannot be read as JSON ({error})")))
    if not units:
        raise BadUnitError("holds no line")
    return units
