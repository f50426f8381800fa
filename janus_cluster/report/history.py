"""A run's history: its steps, evaluations, attempts, events and configuration, from its folder."""

from __future__ import annotations

import json
import math
import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

from janus_cluster.config.secrets import is_secret
from janus_cluster.errors import JanusError
from janus_cluster.observe.text import clean_line, load_secrets, redact
from janus_cluster.report.table import MAX_COLUMNS, Table, number
from janus_cluster.rundir import RunDir, read_json

# The names that people use for the segments of an answer; the keys are those of loss_segments.
SEGMENTS = {
    "subinstruction": "sub-instruction",
    "description_2d": "2D description",
    "description_3d": "3D description",
    "action": "action",
}
RANK_VALUES = ("gpu_memory_peak_gb", "data_wait_s", "visual_tokens")

_STEP_VALUES = (
    "time", "attempt", "step", "loss", "loss_text", "loss_action", "learning_rate", "grad_norm", "num_tokens",
    "padding_share", "step_time_s", "samples_per_s", "total_steps",
)  # fmt: skip
_EVAL_VALUES = ("time", "attempt", "step", "action_accuracy", "majority_accuracy", "macro_f1", "num_samples")
_EVENT_KINDS = ("start", "checkpoint", "checkpoint_broken", "stop", "resume", "export")
# A run that saves every minute for a month; the page shows the last of them.
_MAX_EVENTS = 20_000
_PASSWORD_IN_URL = re.compile(r"://[^/\s:@]*:[^/\s@]+@")


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened once. Units: time epoch seconds, NaN if unknown."""

    kind: str
    time: float
    attempt: int | None = None
    step: int | None = None
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt, as its attempt.json tells. Units: epoch seconds; ended_at NaN: running, or killed with its node."""

    number: int
    started_at: float
    ended_at: float
    state: str
    from_step: int | None = None
    nodes: tuple[str, ...] = ()
    exit_code: int | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One value of the configuration, as text, and where it came from."""

    value: str
    origin: str

    @property
    def is_default(self) -> bool:
        return self.origin == "default"


@dataclass(frozen=True, kw_only=True)
class History:
    """All that a report shows of a run; every text is fit to be shown and holds no secret of the run."""

    name: str
    source: str
    steps: Table
    evaluations: Table
    events: Sequence[Event] = ()
    attempts: Sequence[Attempt] = ()
    settings: Mapping[str, Setting] = field(default_factory=dict)
    state: str | None = None
    num_nodes: int | None = None
    # The loss of the last logged step is no finite number.
    has_diverged: bool = False
    # What a reader of the figures must know: damaged lines, how steps were counted.
    notes: Sequence[str] = ()


class _Words:
    """Makes texts of the run fit to be shown."""

    def __init__(self, run: RunDir) -> None:
        self._secrets = load_secrets(run)

    def __call__(self, value: object) -> str:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        return clean_line(_PASSWORD_IN_URL.sub("://<password>@", redact(text, self._secrets)))


def load_history(run: RunDir) -> History:
    """The run's history; what is damaged or missing is left out and told in `notes`. Raises: JanusError."""
    words = _Words(run)
    steps, evaluations, notes = Table(), Table(), []
    events: deque[Event] = deque(maxlen=_MAX_EVENTS)
    num_foreign, has_diverged = 0, False
    not_finite: list[int | None] = []
    try:
        for record in run.read_metrics():
            if not isinstance(record, dict):
                num_foreign += 1
            elif record.get("kind") == "train":
                steps.add(_step_row(record))
                if isinstance(loss := record.get("loss"), float):
                    has_diverged = not math.isfinite(loss)
                    if has_diverged:
                        not_finite.append(_whole(record.get("step")))
            elif record.get("kind") == "eval":
                evaluations.add({name: number(record.get(name)) for name in _EVAL_VALUES})
            elif record.get("kind") in _EVENT_KINDS:
                events.append(_event(record, words))
    except OSError as e:
        raise JanusError(f"{run.metrics_jsonl}: {e.strerror}", hint=f"ls -l {run.path}") from e
    if num_foreign:
        notes.append(f"{num_foreign} lines of the metrics are no records and were left out")
    if not_finite:
        notes.append(f"the loss is no finite number from step {not_finite[0]} on, {len(not_finite)} times")
    if steps.stride > 1:
        notes.append(f"of {steps.stride} logged steps one is shown")
    attempts = _without_ghosts([a for n in run.attempts() if (a := _load_attempt(run, n, words)) is not None])
    events.extend(v for n in run.attempts() if (v := _load_verdict(run, n, words)) is not None)
    job, origins = _load_job(run)
    return History(
        name=words(run.name),
        source=words(str(run.path)),
        steps=steps,
        evaluations=evaluations,
        events=sorted(events, key=lambda e: e.time if math.isfinite(e.time) else math.inf),
        attempts=attempts,
        settings=_settings(job, origins, words),
        state=_load_state(run, words),
        num_nodes=_whole(job.get("nodes")),
        has_diverged=has_diverged,
        notes=notes,
    )


def _step_row(record: Mapping[str, Any]) -> dict[str, float]:
    row = {name: number(record.get(name)) for name in _STEP_VALUES}
    segments = record.get("loss_segments")
    if isinstance(segments, dict):
        row |= {f"segment.{name}": number(segments.get(name)) for name in SEGMENTS}
    ranks = record.get("ranks")
    by_rank: dict[str, Any] = ranks if isinstance(ranks, dict) else {}
    for name in RANK_VALUES:
        values = by_rank.get(name)
        if isinstance(values, list):
            row |= {f"{name}.{rank}": number(value) for rank, value in enumerate(values[:MAX_COLUMNS])}
    return row


def _event(record: Mapping[str, Any], words: _Words) -> Event:
    parts = (record.get(key) for key in ("path", "checkpoint", "reason"))
    return Event(
        kind=str(record["kind"]),
        time=number(record.get("time")),
        attempt=_whole(record.get("attempt")),
        step=_whole(record.get("step")),
        text=": ".join([*(words(p) for p in parts if p is not None), *_start_words(record)]),
    )


def _start_words(record: Mapping[str, Any]) -> list[str]:
    """How long a start took, and its three longest parts; nothing for other records."""
    seconds = record.get("seconds")
    if record["kind"] != "start" or not isinstance(seconds, dict):
        return []
    parts = sorted(((number(s), str(part)) for part, s in seconds.items()), reverse=True)
    longest = ", ".join(f"{clean_line(part).replace('_', ' ')} {s:.1f}" for s, part in parts[:3])
    return [f"{number(record.get('total_s')):.1f} s after its processes began ({longest})"]


def _load_attempt(run: RunDir, attempt: int, words: _Words) -> Attempt | None:
    record = _read_object(run, "attempt", attempt)
    if not record or math.isnan(number(record.get("started_at"))):
        return None
    nodes = record.get("nodes")
    return Attempt(
        number=attempt,
        started_at=number(record.get("started_at")),
        ended_at=number(record.get("ended_at")),
        state=words(record.get("state") or "?"),
        from_step=_whole(record.get("from_step")),
        nodes=tuple(words(n) for n in nodes) if isinstance(nodes, list) else (),
        exit_code=_whole(record.get("exit_code")),
        reason=words(record.get("reason") or ""),
    )


def _without_ghosts(attempts: Sequence[Attempt]) -> list[Attempt]:
    """The same, but an attempt that says RUNNING although another one followed was killed, at the latest then."""
    told = []
    for attempt, after in zip_longest(attempts, attempts[1:]):
        if after is not None and math.isnan(attempt.ended_at):
            told.append(replace(attempt, state="KILLED", reason=attempt.reason or "killed before it could say why"))
        else:
            told.append(attempt)
    return told


def _load_verdict(run: RunDir, attempt: int, words: _Words) -> Event | None:
    """The gate's verdict, with the checks that decided it where it is not PASS."""
    record = _read_object(run, "verdict", attempt)
    if not record:
        return None
    state = words(record.get("state") or "?")
    results = record.get("results")
    worst = [r for r in results if isinstance(r, dict) and r.get("state") == state] if isinstance(results, list) else []
    causes = [
        f"{words(r.get('id'))} on {words(r.get('node') or 'all nodes')}: {words(r.get('measured'))}" for r in worst
    ]
    text = f"{state}: {'; '.join(causes[:3])}" if state != "PASS" and causes else state
    return Event(kind="gate", time=number(record.get("created_at")), attempt=attempt, text=text)


def _load_job(run: RunDir) -> tuple[dict[str, Any], dict[str, Any]]:
    record = _read_object(run, "resolved", 0)
    job, origins = record.get("job"), record.get("origins")
    return (job if isinstance(job, dict) else {}), (origins if isinstance(origins, dict) else {})


def _load_state(run: RunDir, words: _Words) -> str | None:
    state = _read_object(run, "status", 0).get("state")
    return None if state is None else words(state)


def _read_object(run: RunDir, what: str, attempt: int) -> dict[str, Any]:
    paths = {
        "attempt": run.attempt_json(attempt),
        "verdict": run.verdict_json(attempt),
        "resolved": run.resolved_json,
        "status": run.status_json,
    }
    try:
        value = read_json(paths[what])
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _settings(job: Mapping[str, Any], origins: Mapping[str, Any], words: _Words) -> dict[str, Setting]:
    found = {}
    for key, value in sorted(_flatten(job)):
        # An empty section has no origin of its own; a key inside a free one (slurm.partition) may have its section's.
        parts = key.split(".")
        prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        origin = next((origins[p] for p in prefixes if p in origins), "default")
        shown = f"<{parts[-1]}>" if is_secret(parts[-1]) and value is not None else words(value)
        found[words(key)] = Setting(value=shown, origin=words(origin))
    return found


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _flatten(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
