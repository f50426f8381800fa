"""Data sets that are one file with a list of records: .json, .jsonl, .json.gz, .jsonl.gz.

A record's fields determine its kind; a root's `format` allows one kind only. The trajectories' train.json.gz holds its
list under "episodes".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from janus_cluster.errors import UsageError
from janus_cluster.janusvln.data.formats import annotation, json_samples, trajectories
from janus_cluster.janusvln.data.formats.source import (
    AbsentError,
    BadUnitError,
    Record,
    Source,
    UnknownActionError,
)
from janus_cluster.janusvln.data.formats.stream import BrokenLine, RecordStream
from janus_cluster.janusvln.data.store import Collector

ReadRecord = Callable[[Source, Record, str, Collector], None]


class Kind(NamedTuple):
    """One kind of record: its name in `format`, how it is recognised, and its reader."""

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

    def list_units(self, source: Source) -> RecordUnits:
        """Every record of the file."""
        return RecordUnits(source)

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
        except UnknownActionError as error:
            collector.unknown_action(source.path, error.spelling, f"record {number}: ")
        except (BadUnitError, OSError) as error:
            collector.problem(source.path, f"record {number}: {error}", lost=1)


class RecordUnits:
    """The records of a root's file, read as they are asked for."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._stream = RecordStream(source.path)

    def share_read(self) -> float:
        """How much of the file has been read, 0 to 1."""
        return self._stream.share_read()

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        try:
            yield from self._stream
        except BadUnitError as error:
            raise UsageError(
                f"data.roots: {self._source.path} {error}",
                hint="a data set that cannot be read at all is refused; mend it, or take it out of data.roots",
            ) from error


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
