"""health/<node>.jsonl: GPUs and links of one node while it trains, a line a sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from janus_cluster.run.records.base import Record, parse_json


@dataclass(frozen=True, kw_only=True)
class GpuSample(Record):
    """One GPU at one moment; None for what was not reported. `reasons`: bits of clocks_event_reasons.active."""

    SCHEMA_VERSION: ClassVar[int | None] = None

    gpu: int
    sm_mhz: float | None = None
    sm_max_mhz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    memory_used_mib: float | None = None
    reasons: int | None = None


@dataclass(frozen=True, kw_only=True)
class HealthSample(Record):
    """One line. Units: time epoch seconds.

    link_errors: port → counter → errors since the first sample, of the counters that grew. problem: what could not be
    read; written once, with the sample where it began.
    """

    SCHEMA_VERSION: ClassVar[int | None] = None

    time: float
    gpus: tuple[GpuSample, ...] = ()
    link_errors: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    problem: str | None = None


def load_samples(path: Path, *, most_bytes: int) -> list[HealthSample]:
    """The samples in the last bytes of the file; [] where it cannot be read. Lines that hold none are left out."""
    try:
        with path.open("rb") as f:
            start = f.seek(max(0, f.seek(0, 2) - most_bytes))
            lines = f.read(most_bytes).split(b"\n")[:-1]
    except OSError:
        return []
    parsed = (_parse_sample(line) for line in (lines[1:] if start else lines))
    return [sample for sample in parsed if sample is not None]


def _parse_sample(line: bytes) -> HealthSample | None:
    try:
        return HealthSample.from_json(parse_json(line))
    except ValueError:
        return None
