"""metrics.jsonl: a line for everything that happens in training, appended by global rank 0 alone; a type a kind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.base import Record, parse_json


@dataclass(frozen=True, kw_only=True)
class Event(Record):
    """What every line has. Units: time epoch seconds; `step` counts optimizer steps of the whole run."""

    SCHEMA_VERSION: ClassVar[int | None] = None
    KIND: ClassVar[str]

    time: float | None = None
    attempt: int | None = None
    step: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The object of the line; its kind is the first key."""
        return {"kind": self.KIND, **super().to_json()}


@dataclass(frozen=True, kw_only=True)
class StartEvent(Event):
    """The attempt's first step is done. Units: seconds, by part of the start."""

    KIND: ClassVar[str] = "start"

    total_s: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MemoryEvent(Event):
    """The fullest rank's peak against the plan of training.memory: auto. Units: GB of 1e9 bytes."""

    KIND: ClassVar[str] = "memory"

    planned_gb: float | None = None
    measured_gb: float | None = None
    rank: int | None = None
    gpu_gb: float | None = None
    option: str | None = None
    warning: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainEvent(Event):
    """A logged step. Units: see training/metrics.py. `ranks`: lists by rank of what differs between ranks."""

    KIND: ClassVar[str] = "train"

    total_steps: int | None = None
    epoch: float | None = None
    loss: float | None = None
    loss_text: float | None = None
    loss_action: float | None = None
    loss_segments: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float | None = None
    grad_norm: float | None = None
    num_tokens: float | None = None
    padding_share: float | None = None
    step_time_s: float | None = None
    samples_per_s: float | None = None
    ranks: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EvalEvent(Event):
    """Scores on the held-out samples; None for those of an action head that is not scored."""

    KIND: ClassVar[str] = "eval"

    num_samples: int | None = None
    action_accuracy: float | None = None
    majority_accuracy: float | None = None
    majority_action: str | None = None
    macro_f1: float | None = None
    f1_by_action: Mapping[str, Any] = field(default_factory=dict)
    perplexity_by_segment: Mapping[str, Any] = field(default_factory=dict)
    duration_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class CheckpointEvent(Event):
    """A checkpoint is whole."""

    KIND: ClassVar[str] = "checkpoint"

    path: str | None = None
    duration_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class CheckpointBrokenEvent(Event):
    """A damaged checkpoint was set aside on resume; `path` is its new name."""

    KIND: ClassVar[str] = "checkpoint_broken"

    path: str | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class ResumeEvent(Event):
    """The attempt goes on from a checkpoint."""

    KIND: ClassVar[str] = "resume"

    checkpoint: str | None = None


@dataclass(frozen=True, kw_only=True)
class StopEvent(Event):
    """The attempt was asked to stop, and has saved at this step."""

    KIND: ClassVar[str] = "stop"

    checkpoint: str | None = None


@dataclass(frozen=True, kw_only=True)
class ExportEvent(Event):
    """The trained model is exported."""

    KIND: ClassVar[str] = "export"

    path: str | None = None


@dataclass(frozen=True, kw_only=True)
class CompleteEvent(Event):
    """All steps are done, and what the job exports is written: the last record of a completed run."""

    KIND: ClassVar[str] = "complete"

    total_steps: int | None = None


_KINDS: Mapping[str, type[Event]] = {
    kind.KIND: kind
    for kind in (
        StartEvent, MemoryEvent, TrainEvent, EvalEvent, CheckpointEvent, CheckpointBrokenEvent, ResumeEvent, StopEvent,
        ExportEvent, CompleteEvent,
    )
}  # fmt: skip


def append_event(run: RunDir, event: Event) -> None:
    """metrics.jsonl has one whole line more. Raises: OSError."""
    event.append(run.metrics_jsonl)


def read_events(run: RunDir) -> Iterator[Event]:
    """Every event of metrics.jsonl, one by one; lines that hold none are left out. Raises: OSError."""
    return (event for event in read_lines(run) if event is not None)


def read_lines(run: RunDir) -> Iterator[Event | None]:
    """The event of every whole line; None for a line that holds none. A torn last line is left out. Raises: OSError."""
    if not run.metrics_jsonl.exists():
        return
    with run.metrics_jsonl.open("rb") as f:
        yield from (parse_event(line) for line in f if line.endswith(b"\n"))


def load_last_events(run: RunDir, *, most_bytes: int) -> list[Event]:
    """The events in the last bytes of metrics.jsonl, whatever its size; [] where it cannot be read."""
    try:
        with run.metrics_jsonl.open("rb") as f:
            start = f.seek(max(0, f.seek(0, 2) - most_bytes))
            lines = f.read(most_bytes).split(b"\n")[:-1]
    except OSError:
        return []
    return parse_events(lines[1:] if start else lines)


def parse_events(lines: Iterable[bytes | str]) -> list[Event]:
    """The events of these lines."""
    return [event for line in lines if (event := parse_event(line)) is not None]


def parse_event(line: bytes | str) -> Event | None:
    """The event of a line; None for one that is torn, damaged or of a kind that is not known."""
    try:
        value = parse_json(line)
        kind = _KINDS.get(value["kind"]) if isinstance(value, dict) and isinstance(value.get("kind"), str) else None
        return None if kind is None else kind.from_json(value)
    except ValueError:
        return None
