"""The picture of a run's attempts and events over time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from janus_cluster.report.drawing import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, build_figure
from janus_cluster.report.history import Attempt, History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STATE_COLOURS = {
    "COMPLETED": GREEN, "RUNNING": SKY, "STOPPED": ORANGE, "FAILED": VERMILION, "CANCELLED": GREY,
    "KILLED": "#8c3b00",
}  # fmt: skip
# kind → (label, marker, colour, height in the attempt's bar). Heights differ, so that events at one time stay visible.
_EVENTS = {
    "gate": ("gate's verdict", "D", "black", 0.0),
    "start": ("first step", "o", SKY, 0.17),
    "resume": ("resumed", ">", BLUE, 0.17),
    "checkpoint": ("checkpoint", "|", "white", 0.0),
    "checkpoint_broken": ("broken checkpoint", "X", "black", 0.17),
    "stop": ("stopped on purpose", "s", PURPLE, -0.17),
    "export": ("exported", "*", "black", -0.17),
}


def draw_timeline(history: History) -> Figure | None:
    attempts = history.attempts
    if not attempts:
        return None
    begin_s = min(a.started_at for a in attempts)
    times = [e.time for e in history.events] + list(history.steps.column("time"))
    end_s = max([begin_s + 1, *(t for t in (*times, *(a.ended_at for a in attempts)) if math.isfinite(t))])
    divisor, unit = _time_unit(end_s - begin_s)

    def x(time_s: float) -> float:
        return (time_s - begin_s) / divisor

    steps = history.steps
    heights = [2.4] if len(steps) else []
    figure, axes = build_figure(len(heights) + 1, heights=[*heights, 0.9 + 0.42 * len(attempts)])
    lanes = axes[-1]
    for progress in axes[:-1]:
        x_steps = [x(t) for t in steps.column("time")]
        progress.plot(x_steps, list(steps.column("step")), color=BLUE, linewidth=1.6, drawstyle="steps-post")
        progress.set_ylabel("step")
    starts = [a.started_at for a in attempts[1:]]
    for attempt, latest_s in zip(attempts, [*starts, end_s], strict=True):
        _draw_attempt(lanes, attempt, x=x, latest_s=latest_s)
    for kind, (label, marker, colour, offset) in _EVENTS.items():
        placed = [e for e in history.events if e.kind == kind and _is_placed(e, attempts)]
        if not placed:
            continue
        is_tick = marker == "|"
        lanes.scatter(
            [x(e.time) for e in placed],
            [(e.attempt or 0) + offset for e in placed],
            marker=marker,
            s=60 if is_tick else 48,
            color=colour,
            edgecolors=None if is_tick else "white",
            linewidths=1.1 if is_tick else 0.7,
            zorder=3,
            # A white stroke would not be seen in the legend.
            label=None if is_tick else label,
        )
    lanes.set_yticks([a.number for a in attempts], [f"attempt {a.number}" for a in attempts])
    lanes.set_ylim(max(a.number for a in attempts) + 0.6, min(a.number for a in attempts) - 0.6)
    lanes.grid(axis="y", visible=False)
    lanes.set_xlabel(f"{unit} since the first attempt began")
    _timeline_legend(figure, lanes, attempts, has_checkpoints=any(e.kind == "checkpoint" for e in history.events))
    return figure


def _draw_attempt(ax: Axes, attempt: Attempt, *, x: Callable[[float], float], latest_s: float) -> None:
    is_over = math.isfinite(attempt.ended_at)
    end = attempt.ended_at if is_over else latest_s
    ax.barh(
        attempt.number,
        x(end) - x(attempt.started_at),
        left=x(attempt.started_at),
        height=0.62,
        color=_STATE_COLOURS.get(attempt.state, GREY),
        hatch=None if is_over else "//",
        edgecolor="white",
        zorder=2,
    )


def _timeline_legend(figure: Figure, ax: Axes, attempts: Sequence[Attempt], *, has_checkpoints: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = list(ax.get_legend_handles_labels()[0])
    if has_checkpoints:
        handles.append(Line2D([], [], marker="|", linestyle="", color=GREY, label="checkpoint", markersize=9))
    for state in dict.fromkeys(a.state for a in attempts):
        handles.append(Patch(color=_STATE_COLOURS.get(state, GREY), label=state.lower()))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)


def _is_placed(event: Any, attempts: Sequence[Attempt]) -> bool:
    return math.isfinite(event.time) and any(a.number == event.attempt for a in attempts)


def _time_unit(span_s: float) -> tuple[float, str]:
    if span_s < 300:
        return 1.0, "seconds"
    return (60.0, "minutes") if span_s < 3 * 3600 else (3600.0, "hours")
