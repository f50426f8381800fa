"""A run's pictures, as PNG: pure functions from histories; a picture without values is not made."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from janus_cluster.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    MIN_SMOOTHED,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    add_legend,
    build_figure,
    draw_line,
    font_families,
    mark_attempts,
    render_png,
    require_matplotlib,
)
from janus_cluster.report.history import RANK_VALUES, SEGMENTS, History
from janus_cluster.report.table import Table, finite
from janus_cluster.report.timeline import draw_timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SEGMENT_COLOURS = dict(zip(SEGMENTS, (BLUE, ORANGE, GREEN, VERMILION), strict=True))
_RUN_COLOURS = (BLUE, VERMILION)
# The first is wider: it is still seen where both are the same.
_RUN_WIDTHS = (2.6, 1.2)
_RANK_LABELS = {
    "gpu_memory_peak_gb": "GPU memory peak (GB)",
    "data_wait_s": "waiting for data (s/step)",
    "visual_tokens": "visual tokens per step",
}
_MANY_RANKS = 8


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture. `name` is its file's name without the ending."""

    name: str
    title: str
    png: bytes


def draw_pictures(history: History) -> list[Picture]:
    """Every picture for which the run has values, in the order of the page."""
    require_matplotlib()
    drawn = [
        ("loss", "Loss", _draw_loss(history)),
        ("accuracy", "Held-out action accuracy", _draw_accuracy(history)),
        ("speed", "Speed", _draw_speed(history)),
        ("ranks", "Ranks", _draw_ranks(history)),
        ("timeline", "Attempts and events", draw_timeline(history)),
    ]
    return [Picture(name=n, title=t, png=render_png(figure)) for n, t, figure in drawn if figure is not None]


def draw_comparison(a: History, b: History) -> list[Picture]:
    """Both runs' loss, seconds a step and accuracy, each in one panel; no picture where they have nothing."""
    require_matplotlib()
    panels = [
        ("loss", "loss", "steps"),
        ("step_time_s", "s/step", "steps"),
        ("action_accuracy", "held-out action accuracy", "evaluations"),
    ]
    wanted = [p for p in panels if any(getattr(h, p[2]).has(p[0]) for h in (a, b))]
    if not wanted:
        return []
    figure, axes = build_figure(len(wanted), height=3.0)
    for ax, (name, label, table_name) in zip(axes, wanted, strict=True):
        for history, colour, width in zip((a, b), _RUN_COLOURS, _RUN_WIDTHS, strict=True):
            table: Table = getattr(history, table_name)
            if table.has(name):
                draw_line(ax, table, name, colour=colour, label=None, marker=table_name != "steps", width=width)
        ax.set_ylabel(label)
    _comparison_legend(axes[0], a, b)
    if wanted[-1][0] == "action_accuracy":
        axes[-1].set_ylim(-0.03, 1.03)
    if any(h.steps.has("step_time_s") for h in (a, b)):
        _scale_step_times(axes[[p[0] for p in wanted].index("step_time_s")], a, b)
    axes[-1].set_xlabel("step")
    return [Picture(name="comparison", title="Both runs", png=render_png(figure))]


def _comparison_legend(ax: Axes, a: History, b: History) -> None:
    """The two runs' colours, above the first panel, for any panels with values."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, linewidth=width, label=_shorten(h.name))
        for h, colour, width in zip((a, b), _RUN_COLOURS, _RUN_WIDTHS, strict=True)
    ]
    prop = {"family": font_families(), "size": 9}
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, frameon=False, prop=prop)


def _draw_loss(history: History) -> Figure | None:
    steps = history.steps
    if not steps.has("loss"):
        return None
    segments = [s for s in SEGMENTS if steps.has(f"segment.{s}")]
    figure, axes = build_figure(2 if segments else 1, height=3.2)
    draw_line(axes[0], steps, "loss", colour="black", label="total")
    for name, label, colour in (("loss_text", "text", SKY), ("loss_action", "action head", PURPLE)):
        if steps.has(name):
            draw_line(axes[0], steps, name, colour=colour, label=label)
    axes[0].set_ylabel("loss")
    for segment in segments:
        draw_line(
            axes[1], steps, f"segment.{segment}", colour=_SEGMENT_COLOURS[segment], label=SEGMENTS[segment], faint=0.12
        )
    if segments:
        axes[1].set_ylabel("text loss by segment")
    for ax in axes:
        mark_attempts(ax, steps)
        add_legend(ax)
    axes[-1].set_xlabel("step")
    return figure


def _draw_accuracy(history: History) -> Figure | None:
    table = history.evaluations
    if not table.has("action_accuracy"):
        return None
    figure, (ax,) = build_figure(1, height=3.0)
    draw_line(ax, table, "action_accuracy", colour=BLUE, label="action head", marker=True)
    if table.has("macro_f1"):
        draw_line(ax, table, "macro_f1", colour=GREEN, label="macro F1", marker=True)
    if table.has("majority_accuracy"):
        # Of one evaluation a line would be a point under the other one.
        known = [v for v in table.column("majority_accuracy") if math.isfinite(v)]
        ax.axhline(known[-1], color=GREY, linestyle="--", linewidth=1.3, label="always the majority class")
    ax.set_ylim(-0.03, 1.03)
    ax.set_xlim(left=0)
    ax.set_ylabel("accuracy, F1")
    ax.set_xlabel("step")
    add_legend(ax)
    return figure


def _draw_speed(history: History) -> Figure | None:
    steps = history.steps
    names = [n for n in ("step_time_s", "samples_per_s") if steps.has(n)]
    if not names:
        return None
    figure, axes = build_figure(len(names), height=2.4)
    labels = {"step_time_s": "s/step", "samples_per_s": "samples/s"}
    for ax, name in zip(axes, names, strict=True):
        draw_line(ax, steps, name, colour=BLUE, label=labels[name])
        ax.set_ylabel(labels[name])
        ax.set_ylim(bottom=0)
        mark_attempts(ax, steps)
    axes[-1].set_xlabel("step")
    return figure


def _draw_ranks(history: History) -> Figure | None:
    """A panel for each value that ranks report; values that are all 0 (no GPU) get none."""
    steps = history.steps
    columns = {value: [n for n in steps.names if n.startswith(f"{value}.")] for value in RANK_VALUES}
    panels = [v for v, names in columns.items() if any(x > 0 for n in names for x in steps.column(n))]
    if not panels:
        return None
    import matplotlib

    figure, axes = build_figure(len(panels), height=2.6)
    colours = matplotlib.colormaps["viridis"]
    for ax, value in zip(axes, panels, strict=True):
        names = columns[value]
        # Of many ranks the outlier is labelled, and those at the ends of the colours.
        medians = [statistics.median(finite(steps.column(n)) or [-math.inf]) for n in names]
        named = {0, len(names) - 1, medians.index(max(medians))}
        for i, name in enumerate(names):
            colour = colours(0.9 * i / max(1, len(names) - 1))
            label = f"rank {i}" if len(names) <= _MANY_RANKS or i in named else None
            draw_line(ax, steps, name, colour=colour, label=label, faint=0.0 if len(steps) >= MIN_SMOOTHED else 1.0)
        ax.set_ylabel(_RANK_LABELS[value])
        ax.set_ylim(bottom=0)
        add_legend(ax)
    axes[-1].set_xlabel("step")
    return figure


def _scale_step_times(ax: Axes, a: History, b: History) -> None:
    """A logarithmic axis where one run is more than ten times as slow as the other."""
    from matplotlib.ticker import FormatStrFormatter

    values = [v for h in (a, b) for v in h.steps.column("step_time_s") if math.isfinite(v) and v > 0]
    if values and max(values) > 10 * min(values):
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    else:
        ax.set_ylim(bottom=0)


def _shorten(text: str, width: int = 34) -> str:
    return text if len(text) <= width else f"{text[: width // 2 - 1]}…{text[-width // 2 :]}"
