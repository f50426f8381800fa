"""Files of a standstill: what each rank was doing, written by the ranks before the attempt ends them.

The trace of torch's flight recorder is a pickle that torch, or NCCL's own watchdog at its time-out, writes.
Source: torch/csrc/distributed/c10d/FlightRecorder.hpp, dumps of torch 2.13 (version 2.10).
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from janus_cluster.run.records.base import Record

# 2,000 entries of a rank, with stacks, are 4 MB.
MOST_TRACE_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Collective(Record):
    """A collective that a rank has called and that has not finished. `number` counts the calls of its group."""

    SCHEMA_VERSION: ClassVar[int | None] = None

    number: int
    name: str
    sizes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[str, ...] = ()
    state: str = "scheduled"

    def describe(self) -> str:
        """Such as "all_reduce #412 (Float [4096])"."""
        tensors = [f"{dtype} {list(size)}" for dtype, size in zip(self.dtypes, self.sizes, strict=False)]
        shown = f"{tensors[0]} and {len(tensors) - 1} more" if len(tensors) > 1 else "".join(tensors)
        return f"{self.name} #{self.number}" + (f" ({shown})" if shown else "")


@dataclass(frozen=True, kw_only=True)
class GroupState(Record):
    """One process group as a rank sees it. `ranks`: its members in the world; none where that is not known.

    last_number: of the newest collective that this rank has called. waits_in: the oldest that has not finished.
    """

    SCHEMA_VERSION: ClassVar[int | None] = None

    name: str
    ranks: tuple[int, ...] = ()
    last_number: int = 0
    waits_in: Collective | None = None


@dataclass(frozen=True, kw_only=True)
class StallRecord(Record):
    """stall/rank<r>.json: what a rank was doing while training made no progress. Units: time epoch seconds.

    count: that of the heartbeat; another count there means that the rank has got on since. frames: of the training
    thread, innermost last.
    """

    rank: int
    node: str
    time: float
    count: int | None = None
    doing: str = ""
    step: int = 0
    groups: tuple[GroupState, ...] = ()
    frames: tuple[str, ...] = ()


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, texts, lists and dictionaries: no file of a run folder may name code to be run."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"a trace holds no {module}.{name}")


def parse_trace(data: bytes) -> dict[str, Any]:
    """The dump of a flight recorder as an object. Raises: ValueError where the bytes are none."""
    try:
        value = _PlainUnpickler(io.BytesIO(data)).load()
    except Exception as error:
        # A torn pickle may raise nearly anything.
        raise ValueError(f"no trace of a flight recorder: {error}") from error
    entries = value.get("entries") if isinstance(value, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("no trace of a flight recorder: it has no list of entries")
    return dict(value)


def parse_groups(trace: Mapping[str, Any]) -> tuple[GroupState, ...]:
    """The process groups of a dump; what of it has another shape than the known one is left out."""
    entries: dict[str, list[Mapping[str, Any]]] = {}
    for entry in trace.get("entries", []):
        if not entry.get("is_p2p") and isinstance(entry.get("collective_seq_id"), int):
            entries.setdefault(_group_name(entry), []).append(entry)
    members = trace.get("pg_config")
    return tuple(
        GroupState(
            name=name,
            ranks=_parse_ranks(members.get(name) if isinstance(members, dict) else None),
            last_number=max(int(e["collective_seq_id"]) for e in found),
            waits_in=_oldest_unfinished(found),
        )
        for name, found in entries.items()
    )


def _group_name(entry: Mapping[str, Any]) -> str:
    group = entry.get("process_group")
    return str(group[0]) if isinstance(group, (tuple, list)) and group else ""


def _parse_ranks(config: Any) -> tuple[int, ...]:
    """torch has the members as the text "[0, 1]"."""
    try:
        ranks = json.loads(config["ranks"]) if isinstance(config["ranks"], str) else config["ranks"]
        return tuple(int(rank) for rank in ranks)
    except (TypeError, KeyError, ValueError):
        return ()


def is_finished(entry: Mapping[str, Any]) -> bool:
    """gloo leaves the state of what has finished at "scheduled", and marks it as retired."""
    return bool(entry.get("retired")) or entry.get("state") == "completed"


def _oldest_unfinished(entries: Iterable[Mapping[str, Any]]) -> Collective | None:
    unfinished = [e for e in entries if not is_finished(e)]
    if not unfinished:
        return None
    entry = min(unfinished, key=lambda e: int(e["collective_seq_id"]))
    return Collective(
        number=int(entry["collective_seq_id"]),
        name=str(entry.get("profiling_name", "?")).rpartition(":")[2],
        sizes=_parse_sizes(entry.get("input_sizes")),
        dtypes=tuple(map(str, dtypes)) if isinstance(dtypes := entry.get("input_dtypes"), list) else (),
        state=str(entry.get("state", "scheduled")),
    )


def _parse_sizes(value: Any) -> tuple[tuple[int, ...], ...]:
    try:
        return tuple(tuple(int(n) for n in size) for size in value or ())
    except (TypeError, ValueError):
        return ()
