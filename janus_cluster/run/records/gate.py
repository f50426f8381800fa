"""What the gate's phases found: facts, connect, all_reduce and counters of each node, and the rails between nodes.

The judges in preflight/ know the keys inside; typed here are those that others read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from janus_cluster.run.records.base import Record


@dataclass(frozen=True, kw_only=True)
class NodeReport(Record):
    """The report of one node from one phase."""

    WHOLE: ClassVar[str | None] = "values"

    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FactsRecord(NodeReport):
    """facts.<node>.json: everything that a node reports about itself, without a judgement."""

    @property
    def gpu_names(self) -> tuple[str, ...]:
        """As nvidia-smi names them; empty where it was not run, or its output is not understood."""
        part: Any = self.values
        for key in ("gpu", "identity", "rows"):
            part = part.get(key) if isinstance(part, Mapping) else None
        rows = part if isinstance(part, list) else []
        return tuple(str(row["name"]) for row in rows if isinstance(row, Mapping) and "name" in row)


@dataclass(frozen=True, kw_only=True)
class ConnectRecord(NodeReport):
    """connect.<node>.json: whether this node and node 0 reached each other on the master port."""


@dataclass(frozen=True, kw_only=True)
class AllReduceRecord(NodeReport):
    """all_reduce.<node>.json: what the probe measured on this node. Units: …_s seconds, …_bytes bytes."""


@dataclass(frozen=True, kw_only=True)
class CountersRecord(Record):
    """counters.<node>.json: error counters before and after the probe; gpu_load None: nvidia-smi was not asked."""

    before: Mapping[str, Any]
    after: Mapping[str, Any]
    gpu_load: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Rail(Record):
    """One network that all nodes share; node → the interface as that node calls it, {} for GPU k of every node."""

    SCHEMA_VERSION: ClassVar[int | None] = None

    name: str
    interfaces: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RailsRecord(Record):
    """rails.json: the pairs of interfaces that the probe is to test."""

    rails: tuple[Rail, ...]
