"""Progress of training, from the last lines of metrics.jsonl, read from the file's end."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.metrics import (
    CheckpointEvent,
    EvalEvent,
    Event,
    ExportEvent,
    TrainEvent,
    load_last_events,
)

E = TypeVar("E", bound=Event)

# A training record is about 500 bytes: this holds the last 500 of them, whatever the file's size.
TAIL_BYTES = 256 * 1024
# Steps that the expected time is computed from: enough to even out a checkpoint, few enough to follow a slowdown.
_ETA_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The latest values in metrics.jsonl; None where it has none.

    Units: step_time_s, eta_s seconds; accuracies 0 to 1; time epoch seconds of the last record.
    """

    attempt: int | None = None
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    step_time_s: float | None = None
    # Of the last logged steps: one that wrote a checkpoint or warmed up does not distort it.
    median_step_time_s: float | None = None
    samples_per_s: float | None = None
    eta_s: float | None = None
    action_accuracy: float | None = None
    majority_accuracy: float | None = None
    checkpoint: str | None = None
    export: str | None = None
    # Values that differ between ranks at the last logged step, a list by rank: see training/metrics.py.
    ranks: Mapping[str, Sequence[float]] = field(default_factory=dict)
    # The same as medians over the last logged steps: one that was disturbed does not name a rank.
    median_ranks: Mapping[str, Sequence[float]] = field(default_factory=dict)
    time: float | None = None


def load_progress(run: RunDir) -> Progress:
    """The run's progress, from at most TAIL_BYTES of metrics.jsonl."""
    progress = build_progress(load_last_events(run, most_bytes=TAIL_BYTES))
    checkpoint, export = progress.checkpoint, progress.export
    return replace(
        progress,
        checkpoint=checkpoint and _find_moved(checkpoint, run.checkpoints / Path(checkpoint).name),
        export=export and _find_moved(export, run.export),
    )


def _find_moved(recorded: str, here: Path) -> str:
    """The path now: a run folder that was moved or copied records its former one."""
    return str(here) if not Path(recorded).exists() and here.exists() else recorded


def build_progress(events: Sequence[Event]) -> Progress:
    """Progress from the events; later ones override earlier ones."""
    trained = _of(TrainEvent, events)
    last = trained[-1] if trained else TrainEvent()
    evaluated = [EvalEvent(), *_of(EvalEvent, events)][-1]
    step, total = _last_step(last, events), last.total_steps
    # Not of earlier attempts: they may have run on another number of nodes.
    recent = [event for event in trained[-_ETA_STEPS:] if event.attempt == last.attempt]
    times = [t for event in recent if (t := _finite(event.step_time_s)) is not None]
    median_s = statistics.median(times) if times else None
    known = step is not None and total is not None and median_s is not None
    return Progress(
        attempt=last.attempt,
        step=step,
        total_steps=total,
        loss=last.loss,
        step_time_s=_finite(last.step_time_s),
        median_step_time_s=median_s,
        samples_per_s=_finite(last.samples_per_s),
        eta_s=max(0, (total or 0) - (step or 0)) * (median_s or 0.0) if known else None,
        action_accuracy=evaluated.action_accuracy,
        majority_accuracy=evaluated.majority_accuracy,
        checkpoint=_last_path(CheckpointEvent, events),
        export=_last_path(ExportEvent, events),
        ranks=_by_rank(last.ranks),
        median_ranks=_median_by_rank([_by_rank(event.ranks) for event in recent]),
        time=next((event.time for event in reversed(events) if event.time), None),
    )


def _of(kind: type[E], events: Sequence[Event]) -> list[E]:
    return [event for event in events if isinstance(event, kind)]


def _last_step(last: TrainEvent, events: Sequence[Event]) -> int | None:
    """The last step that the attempt is known to have done: a checkpoint may be later than the last logged one."""
    saved = [event for event in _of(CheckpointEvent, events) if event.attempt == last.attempt]
    known = [event.step for event in saved[-1:] if event.step is not None]
    return None if last.step is None else max([last.step, *known])


def _by_rank(ranks: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """The lists of numbers among the values."""
    lists = {key: [_number(n) for n in value] for key, value in ranks.items() if isinstance(value, list) and value}
    return {key: tuple(n for n in value if n is not None) for key, value in lists.items() if None not in value}


def _median_by_rank(steps: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, tuple[float, ...]]:
    """Of every list, each rank's median over the steps that have it."""
    found = {}
    for key, values in (steps[-1] if steps else {}).items():
        rows = [step[key] for step in steps if len(step.get(key, ())) == len(values)]
        found[key] = tuple(statistics.median(column) for column in zip(*rows, strict=True))
    return found


def _last_path(kind: type[CheckpointEvent] | type[ExportEvent], events: Sequence[Event]) -> str | None:
    paths = (event.path for event in reversed(events) if isinstance(event, kind))
    return next((path for path in paths if path is not None), None)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
