"""How far training has come: the last lines of metrics.jsonl, read from the file's end."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from janus_cluster.rundir import RunDir

# A training record is about 500 bytes: this holds the last 500 of them, whatever the file's size.
TAIL_BYTES = 256 * 1024
# Steps that the expected time is reckoned from: enough to even out a checkpoint, few enough to follow a slowdown.
_ETA_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The last word of metrics.jsonl on each thing; None where it says nothing.

    Units: step_time_s, eta_s seconds; accuracies 0 to 1; time epoch seconds of the last record.
    """

    attempt: int | None = None
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    step_time_s: float | None = None
    # Of the last logged steps: one that wrote a checkpoint or warmed up does not decide it.
    median_step_time_s: float | None = None
    samples_per_s: float | None = None
    eta_s: float | None = None
    action_accuracy: float | None = None
    majority_accuracy: float | None = None
    checkpoint: str | None = None
    export: str | None = None
    # What differs between ranks at the last logged step, a list by rank: see training/metrics.py.
    ranks: Mapping[str, Sequence[float]] = field(default_factory=dict)
    time: float | None = None


def load_progress(run: RunDir) -> Progress:
    """The run's progress, from at most TAIL_BYTES of metrics.jsonl."""
    try:
        with run.metrics_jsonl.open("rb") as f:
            size = f.seek(0, 2)
            start = f.seek(max(0, size - TAIL_BYTES))
            data = f.read(TAIL_BYTES)
    except OSError:
        return Progress()
    lines = data.split(b"\n")[:-1]
    progress = build_progress(parse_records(lines[1:] if start else lines))
    checkpoint, export = progress.checkpoint, progress.export
    return replace(
        progress,
        checkpoint=checkpoint and _find_moved(checkpoint, run.checkpoints / Path(checkpoint).name),
        export=export and _find_moved(export, run.export),
    )


def _find_moved(told: str, here: Path) -> str:
    """Where it is now: a run folder that was moved or copied tells the place it had."""
    return str(here) if not Path(told).exists() and here.exists() else told


def parse_records(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """The JSON objects among the lines; torn and foreign ones are left out."""
    records = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            records.append(value)
    return records


def build_progress(records: Iterable[dict[str, Any]]) -> Progress:
    """What the records say, later ones winning."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    last_time = None
    for record in records:
        by_kind.setdefault(str(record.get("kind")), []).append(record)
        last_time = _number(record.get("time")) or last_time
    trained = by_kind.get("train", [])
    last = trained[-1] if trained else {}
    evaluated = by_kind.get("eval", [{}])[-1]
    step, total = _last_step(last, by_kind), _whole(last.get("total_steps"))
    # Not of earlier attempts: they may have run on another number of nodes.
    recent = [r for r in trained[-_ETA_STEPS:] if r.get("attempt") == last.get("attempt")]
    times = [t for r in recent if (t := _finite(r.get("step_time_s"))) is not None]
    median_s = statistics.median(times) if times else None
    known = step is not None and total is not None and median_s is not None
    return Progress(
        attempt=_whole(last.get("attempt")),
        step=step,
        total_steps=total,
        loss=_number(last.get("loss")),
        step_time_s=_finite(last.get("step_time_s")),
        median_step_time_s=median_s,
        samples_per_s=_finite(last.get("samples_per_s")),
        eta_s=max(0, (total or 0) - (step or 0)) * (median_s or 0.0) if known else None,
        action_accuracy=_number(evaluated.get("action_accuracy")),
        majority_accuracy=_number(evaluated.get("majority_accuracy")),
        checkpoint=_last_path(by_kind.get("checkpoint", [])),
        export=_last_path(by_kind.get("export", [])),
        ranks=_by_rank(last.get("ranks")),
        time=last_time,
    )


def _last_step(last: Mapping[str, Any], by_kind: Mapping[str, Sequence[Mapping[str, Any]]]) -> int | None:
    """The last step that the attempt is known to have done: a checkpoint may lie behind the last logged one."""
    step = _whole(last.get("step"))
    saved = [r for r in by_kind.get("checkpoint", ()) if r.get("attempt") == last.get("attempt")]
    known = [s for r in saved[-1:] if (s := _whole(r.get("step"))) is not None]
    return None if step is None else max([step, *known])


def _by_rank(value: object) -> dict[str, tuple[float, ...]]:
    """The lists of numbers among the values."""
    if not isinstance(value, dict):
        return {}
    lists = {str(k): [_number(n) for n in v] for k, v in value.items() if isinstance(v, list) and v}
    return {k: tuple(n for n in v if n is not None) for k, v in lists.items() if None not in v}


def _last_path(records: list[dict[str, Any]]) -> str | None:
    return next((r["path"] for r in reversed(records) if isinstance(r.get("path"), str)), None)


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _finite(value: object) -> float | None:
    known = _number(value)
    return known if known is not None and math.isfinite(known) else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
