"""Runs in a few figures, and two of them beside each other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from janus_cluster.report.history import History
from janus_cluster.report.table import finite
from janus_cluster.run.records.training import Measure

_LAST_STEPS = 10
# Events whose step was done.
_DONE = ("checkpoint", "stop", "complete")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A run in a few figures; None where it has none.

    Units: step_time_s is the median over the logged steps without the first of every attempt, which also warms up;
    samples_per_s over the same steps; loss_last_10 the mean of the last ten logged; accuracies 0 to 1.
    """

    name: str
    state: str | None
    steps: int | None
    total_steps: int | None
    loss: float | None
    loss_last_10: float | None
    action_accuracy: float | None
    majority_accuracy: float | None
    success_rate: float | None
    spl: float | None
    step_time_s: float | None
    samples_per_s: float | None
    attempts: int
    nodes: int | None


def summarize(history: History) -> Summary:
    """The run in a few figures."""
    steps, evaluations = history.steps, history.evaluations
    losses = finite(steps.column("loss"))
    scores = history.simulation.scores if history.simulation is not None else None
    return Summary(
        name=history.name,
        state=history.state,
        steps=_last_step(history),
        total_steps=_whole(_last(steps.column("total_steps"))),
        loss=math.nan if history.has_diverged else losses[-1] if losses else None,
        loss_last_10=statistics.fmean(losses[-_LAST_STEPS:]) if losses else None,
        action_accuracy=_last(evaluations.column("action_accuracy")),
        majority_accuracy=_last(evaluations.column("majority_accuracy")),
        success_rate=None if scores is None else scores.success_rate.mean,
        spl=None if scores is None else scores.spl.mean,
        step_time_s=_median_of_warm(history, "step_time_s"),
        samples_per_s=_median_of_warm(history, "samples_per_s"),
        attempts=len(history.attempts) or _num_attempts(history),
        nodes=history.num_nodes,
    )


# What is shown, in this order: key of Summary, label, form.
ROWS = (
    ("state", "state", ""),
    ("nodes", "nodes", "d"),
    ("attempts", "attempts", "d"),
    ("steps", "steps", ",d"),
    ("total_steps", "steps planned", ",d"),
    ("loss", "loss of the last step", ".4f"),
    ("loss_last_10", "loss, mean of the last 10 logged", ".4f"),
    ("action_accuracy", "held-out action accuracy", ".3f"),
    ("majority_accuracy", "accuracy of the majority class", ".3f"),
    ("success_rate", "success rate, simulated", ".3f"),
    ("spl", "SPL, simulated", ".3f"),
    ("step_time_s", "s/step, median", ".3f"),
    ("samples_per_s", "samples/s, median", ".2f"),
)


def render_value(summary: Summary, key: str, form: str) -> str:
    """The value as it is shown; a dash where there is none."""
    value = getattr(summary, key)
    return "–" if value is None else format(value, form)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One key of the configuration that is not the same; None: this run does not have it."""

    key: str
    a: str | None
    b: str | None


def compare_settings(a: History, b: History) -> list[Difference]:
    """The keys whose values differ; nothing if one of the two has no configuration, as a log has none."""
    if not a.settings or not b.settings:
        return []
    found = []
    for key in sorted({*a.settings, *b.settings}):
        values = [h.settings[key].value if key in h.settings else None for h in (a, b)]
        if values[0] != values[1]:
            found.append(Difference(key=key, a=values[0], b=values[1]))
    return found


def comparison_to_json(a: History, b: History) -> dict[str, Any]:
    """The object of `compare A B --json`."""
    return {
        "runs": [asdict(summarize(h)) for h in (a, b)],
        "differences": [asdict(d) for d in compare_settings(a, b)],
    }


def describe_simulation(history: History) -> str | None:
    """The walks behind success rate and SPL, with their intervals; None without a simulation."""
    simulation = history.simulation
    if simulation is None or simulation.scores is None:
        return None
    rate, spl = map(_render_measure, (simulation.scores.success_rate, simulation.scores.spl))
    others = ", ".join(f"{name} {scores.success_rate.mean:.3f}" for name, scores in simulation.references.items())
    rooms = ", ".join(f"{key} {simulation.world.get(key)}" for key in ("level", "seed"))
    return (
        f"{simulation.num_episodes} walks in generated rooms ({rooms}): success rate {rate}, SPL {spl}; success rate "
        f"of the same walks: {others}"
    )


def _render_measure(measure: Measure) -> str:
    interval = "" if measure.low is None else f" (95 %: {measure.low:.3f} to {measure.high:.3f})"
    return f"{measure.mean:.3f}{interval}"


def _last_step(history: History) -> int | None:
    """The last step that was done: not every step is logged, but one is saved or completed in the last attempt."""
    logged, attempt = (_whole(_last(history.steps.column(name))) for name in ("step", "attempt"))
    done = [e.step for e in history.events if e.kind in _DONE and e.attempt == attempt and e.step is not None]
    return max([step for step in (logged, *done) if step is not None], default=None)


def _median_of_warm(history: History, name: str) -> float | None:
    """The median without the first logged step of every attempt; of that one alone where there is no other."""
    values, attempts = history.steps.column(name), history.steps.column("attempt")
    warm = [v for v, (before, now) in zip(values[1:], pairwise(attempts), strict=True) if before == now]
    known = finite(warm) or finite(values)
    return statistics.median(known) if known else None


def _num_attempts(history: History) -> int:
    return len(set(finite(history.steps.column("attempt"))))


def _last(values: Sequence[float]) -> float | None:
    known = finite(values)
    return known[-1] if known else None


def _whole(value: float | None) -> int | None:
    return int(value) if value is not None and math.isfinite(value) else None
