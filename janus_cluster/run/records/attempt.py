"""Files of one attempt: attempt.json, stop.json, the ranks' heartbeats, versions.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from janus_cluster.run.records.base import Record
from janus_cluster.run.records.failure import FailureRecord


@dataclass(frozen=True, kw_only=True)
class HangRecord(Record):
    """The standstill for which an attempt ended its ranks. `rank` and `node`: None where no single one is to blame.

    collective: which one does not finish, and who is missing in it; None where the ranks wrote of none. frames: of the
    missing rank, where it could write what it was doing.
    """

    SCHEMA_VERSION: ClassVar[int | None] = None

    rank: int | None = None
    node: str | None = None
    message: str
    collective: str | None = None
    missing: tuple[int, ...] = ()
    frames: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MemoryRecord(Record):
    """Which option of training.memory: auto an attempt ran with, and why not the one before it."""

    SCHEMA_VERSION: ClassVar[int | None] = None

    option: int
    words: str | None = None
    because: str | None = None


@dataclass(frozen=True, kw_only=True)
class FallbackRecord(Record):
    """The bundle of the next attempt, where this one ran out of memory before its first step, and why."""

    SCHEMA_VERSION: ClassVar[int | None] = None

    bundle: int
    because: str | None = None


@dataclass(frozen=True, kw_only=True)
class AttemptRecord(Record):
    """attempt.json: where an attempt began and how it ended. Units: epoch seconds.

    `ended_at` None: it runs, or was killed with its node. `failure`: why it ended, as classified on the node.
    `bundle` is what it ran, `fallback` what the next attempt of this job runs instead.
    """

    attempt: int
    job_id: str | None = None
    nodes: tuple[str, ...] = ()
    from_step: int
    started_at: float
    ended_at: float | None = None
    state: str
    exit_code: int | None = None
    reason: str | None = None
    hang: HangRecord | None = None
    failure: FailureRecord | None = None
    memory: MemoryRecord | None = None
    bundle: int | None = None
    fallback: FallbackRecord | None = None


@dataclass(frozen=True, kw_only=True)
class StopRecord(Record):
    """stop.json: the attempt asks its ranks to stop at a step boundary. Units: epoch seconds."""

    signal: str
    time: float


@dataclass(frozen=True, kw_only=True)
class HeartbeatRecord(Record):
    """heartbeats/rank<r>.json: written every few seconds by a rank's own thread.

    time: changes while the process lives (epoch seconds, its node's clock). count: changes while training gets on.
    has_begun: a step has begun. has_stepped: an optimizer step is done.
    """

    rank: int
    node: str
    pid: int | None = None
    doing: str
    step: int
    has_begun: bool
    has_stepped: bool = False
    count: int
    time: float


@dataclass(frozen=True, kw_only=True)
class VersionsRecord(Record):
    """versions.json: package → version that the attempt ran with on its first node; None where it is not installed."""

    SCHEMA_VERSION: ClassVar[int | None] = None
    WHOLE: ClassVar[str | None] = "packages"

    packages: Mapping[str, Any] = field(default_factory=dict)
