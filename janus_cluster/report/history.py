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

from janus_cluster.errors import JanusError
from janus_cluster.job.secrets import is_secret
from janus_cluster.report.table import MAX_COLUMNS, Table, number
from janus_cluster.run.current import load_current
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records import metrics
from janus_cluster.run.records.attempt import AttemptRecord
from janus_cluster.run.records.metrics import EvalEvent, MemoryEvent, StartEvent, TrainEvent, read_lines
from janus_cluster.run.records.submission import load_status
from janus_cluster.run.records.training import SIMULATION_JSON, SimulationRecord
from janus_cluster.run.records.verdict import Verdict
from janus_cluster.run.text import clean_line, load_secrets, redact

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
    """One attempt, from its attempt.json. Units: epoch seconds; ended_at NaN: running, or killed with its node."""

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
    """One value of the configuration, as text, and its origin."""

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
    # Of `simulate`, with its scores; None where no simulation has reached its end.
    simulation: SimulationRecord | None = None
    # What a reader of the figures must know: damaged lines, how steps were counted.
    notes: Sequence[str] = ()


class _Sanitiser:
    """Sanitises texts of the run: secrets redacted, escape sequences stripped."""

    def __init__(self, run: RunDir) -> None:
        self._secrets = load_secrets(run)

    def __call__(self, value: object) -> str:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        return clean_line(_PASSWORD_IN_URL.sub("://<password>@", redact(text, self._secrets)))


def load_history(run: RunDir) -> History:
    """The run's history; what is damaged or missing is left out and listed in `notes`. Raises: JanusError."""
    clean = _Sanitiser(run)
    steps, evaluations, notes = Table(), Table(), []
    events: deque[Event] = deque(maxlen=_MAX_EVENTS)
    num_foreign, has_diverged = 0, False
    not_finite: list[int | None] = []
    try:
        for line in read_lines(run):
            if line is None:
                num_foreign += 1
            elif isinstance(line, TrainEvent):
                steps.add(_step_row(line))
                if line.loss is not None:
                    has_diverged = not math.isfinite(line.loss)
                    if has_diverged:
                        not_finite.append(line.step)
            elif isinstance(line, EvalEvent):
                evaluations.add({name: number(getattr(line, name)) for name in _EVAL_VALUES})
            elif not isinstance(line, MemoryEvent):
                events.append(_event(line, clean))
    except OSError as e:
        raise JanusError(f"{run.metrics_jsonl}: {e.strerror}", hint=f"ls -l {run.path}") from e
    if num_foreign:
        notes.append(f"{num_foreign} lines of the metrics are no records and were left out")
    if not_finite:
        notes.append(f"the loss is no finite number from step {not_finite[0]} on, {len(not_finite)} times")
    if steps.stride > 1:
        notes.append(f"of {steps.stride} logged steps one is shown")
    attempts = _with_killed([a for n in run.attempts() if (a := _load_attempt(run, n, clean)) is not None])
    events.extend(v for n in run.attempts() if (v := _load_verdict(run, n, clean)) is not None)
    resolved = load_current(run)
    return History(
        name=clean(run.name),
        source=clean(str(run.path)),
        steps=steps,
        evaluations=evaluations,
        events=sorted(events, key=lambda e: e.time if math.isfinite(e.time) else math.inf),
        attempts=attempts,
        settings=_settings(resolved.job, resolved.origins, clean),
        state=_load_state(run, clean),
        num_nodes=_whole(resolved.value("nodes")),
        has_diverged=has_diverged,
        simulation=_load_simulation(run),
        notes=notes,
    )


def _load_simulation(run: RunDir) -> SimulationRecord | None:
    record = SimulationRecord.load(run.simulation / SIMULATION_JSON)
    return record if record is not None and record.scores is not None else None


def _step_row(line: TrainEvent) -> dict[str, float]:
    row = {name: number(getattr(line, name)) for name in _STEP_VALUES}
    if line.loss_segments:
        row |= {f"segment.{name}": number(line.loss_segments.get(name)) for name in SEGMENTS}
    for name in RANK_VALUES:
        values = line.ranks.get(name)
        if isinstance(values, list):
            row |= {f"{name}.{rank}": number(value) for rank, value in enumerate(values[:MAX_COLUMNS])}
    return row


def _event(line: metrics.Event, clean: _Sanitiser) -> Event:
    parts = (getattr(line, key, None) for key in ("path", "checkpoint", "reason"))
    start = _start_parts(line) if isinstance(line, StartEvent) else []
    return Event(
        kind=line.KIND,
        time=number(line.time),
        attempt=line.attempt,
        step=line.step,
        text=": ".join([*(clean(p) for p in parts if p is not None), *start]),
    )


def _start_parts(line: StartEvent) -> list[str]:
    """How long a start took, and its three longest parts."""
    parts = sorted(((s, part) for part, s in line.seconds.items()), reverse=True)
    longest = ", ".join(f"{clean_line(part).replace('_', ' ')} {s:.1f}" for s, part in parts[:3])
    return [f"{number(line.total_s):.1f} s after its processes began ({longest})"] if parts else []


def _load_attempt(run: RunDir, attempt: int, clean: _Sanitiser) -> Attempt | None:
    if (record := AttemptRecord.load(run.attempt_json(attempt))) is None:
        return None
    return Attempt(
        number=attempt,
        started_at=record.started_at,
        ended_at=number(record.ended_at),
        state=clean(record.state),
        from_step=record.from_step,
        nodes=tuple(clean(node) for node in record.nodes),
        exit_code=record.exit_code,
        reason=clean(_describe_end(record)),
    )


def _describe_end(record: AttemptRecord) -> str:
    """Why a failed attempt failed, as the node classified it; of others, what the attempt gave as its reason."""
    if record.state == "FAILED" and record.failure is not None:
        return record.failure.describe()
    return record.reason or ""


def _with_killed(attempts: Sequence[Attempt]) -> list[Attempt]:
    """The same, with KILLED for an attempt that is still RUNNING in its record although another one followed."""
    corrected = []
    for attempt, after in zip_longest(attempts, attempts[1:]):
        if after is not None and math.isnan(attempt.ended_at):
            corrected.append(
                replace(attempt, state="KILLED", reason=attempt.reason or "killed before it recorded a reason")
            )
        else:
            corrected.append(attempt)
    return corrected


def _load_verdict(run: RunDir, attempt: int, clean: _Sanitiser) -> Event | None:
    """The gate's verdict, with the checks that decided it where it is not PASS."""
    if (verdict := Verdict.load(run.verdict_json(attempt))) is None:
        return None
    worst = [r for r in verdict.results if r.state == verdict.state]
    causes = [f"{clean(r.id)} on {clean(r.node or 'all nodes')}: {clean(r.measured)}" for r in worst]
    text = f"{verdict.state}: {'; '.join(causes[:3])}" if verdict.state != "PASS" and causes else verdict.state
    return Event(kind="gate", time=verdict.created_at, attempt=attempt, text=text)


def _load_state(run: RunDir, clean: _Sanitiser) -> str | None:
    status = load_status(run)
    return None if status is None else clean(status.state)


def _settings(job: Mapping[str, Any], origins: Mapping[str, Any], clean: _Sanitiser) -> dict[str, Setting]:
    found = {}
    for key, value in sorted(_flatten(job)):
        # An empty section has no origin of its own; a key inside a free one (slurm.partition) may have its section's.
        parts = key.split(".")
        prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        origin = next((origins[p] for p in prefixes if p in origins), "default")
        shown = f"<{parts[-1]}>" if is_secret(parts[-1]) and value is not None else clean(value)
        found[clean(key)] = Setting(value=shown, origin=clean(origin))
    return found


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _flatten(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
