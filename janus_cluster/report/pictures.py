"""A run's pictures, as PNG: pure functions from histories; a picture without values is not made.

matplotlib is imported when a picture is drawn, and never through pyplot: no window, no state between pictures.
"""

from __future__ import annotations

import io
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from janus_cluster.errors import JanusError
from janus_cluster.report.history import RANK_VALUES, SEGMENTS, Attempt, History
from janus_cluster.report.table import Table, finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart; the yellow is too pale for a line.
_BLUE, _ORANGE, _GREEN, _VERMILION, _PURPLE, _SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
_GREY = "#7f7f7f"
_SEGMENT_COLOURS = dict(zip(SEGMENTS, (_BLUE, _ORANGE, _GREEN, _VERMILION), strict=True))
_RUN_COLOURS = (_BLUE, _VERMILION)
_STATE_COLOURS = {
    "COMPLETED": _GREEN, "RUNNING": _SKY, "STOPPED": _ORANGE, "FAILED": _VERMILION, "CANCELLED": _GREY,
    "KILLED": "#8c3b00",
}  # fmt: skip
# kind → (label, marker, colour, height in the attempt's bar). Heights differ, so that events at one time stay visible.
_EVENTS = {
    "gate": ("gate's verdict", "D", "black", 0.0),
    "start": ("first step", "o", _SKY, 0.17),
    "resume": ("resumed", ">", _BLUE, 0.17),
    "checkpoint": ("checkpoint", "|", "white", 0.0),
    "checkpoint_broken": ("broken checkpoint", "X", "black", 0.17),
    "stop": ("stopped on purpose", "s", _PURPLE, -0.17),
    "export": ("exported", "*", "black", -0.17),
}
_RANK_LABELS = {
    "gpu_memory_peak_gb": "GPU memory peak (GB)",
    "data_wait_s": "waiting for data (s/step)",
    "visual_tokens": "visual tokens per step",
}
_WIDTH = 9.0
_DPI = 110
# Fewer points than that are drawn as they are; of more, a running median is drawn over them.
_MIN_SMOOTHED = 40
_MANY_RANKS = 8
_CHINESE_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei"),
    *("SimHei", "Microsoft YaHei", "PingFang SC"),
)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture. `name` is its file's name without the ending."""

    name: str
    title: str
    png: bytes


def require_matplotlib() -> None:
    """matplotlib can be imported. Raises: JanusError with what to install."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as e:
        raise JanusError(f"pictures need matplotlib: {e}", hint="pip install 'janus-cluster[report]'") from e


def draw_pictures(history: History) -> list[Picture]:
    """Every picture for which the run has values, in the order of the page."""
    require_matplotlib()
    drawn = [
        ("loss", "Loss", _draw_loss(history)),
        ("accuracy", "Held-out action accuracy", _draw_accuracy(history)),
        ("speed", "Speed", _draw_speed(history)),
        ("ranks", "Ranks", _draw_ranks(history)),
        ("timeline", "Attempts and events", _draw_timeline(history)),
    ]
    return [Picture(name=n, title=t, png=_to_png(figure)) for n, t, figure in drawn if figure is not None]


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
    figure, axes = _figure(len(wanted), height=3.0)
    for ax, (name, label, table_name) in zip(axes, wanted, strict=True):
        # The first is wider: it is still seen where both are the same.
        for history, colour, width in zip((a, b), _RUN_COLOURS, (2.6, 1.2), strict=True):
            table: Table = getattr(history, table_name)
            if table.has(name):
                _line(ax, table, name, colour=colour, label=None, marker=table_name != "steps", width=width)
        ax.set_ylabel(label)
    _comparison_legend(axes[0], a, b)
    if wanted[-1][0] == "action_accuracy":
        axes[-1].set_ylim(-0.03, 1.03)
    if any(h.steps.has("step_time_s") for h in (a, b)):
        _scale_step_times(axes[[p[0] for p in wanted].index("step_time_s")], a, b)
    axes[-1].set_xlabel("step")
    return [Picture(name="comparison", title="Both runs", png=_to_png(figure))]


def _comparison_legend(ax: Axes, a: History, b: History) -> None:
    """The two runs' colours, above the first panel, whichever panels they have values in."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, linewidth=2.4, label=_shorten(h.name))
        for h, colour in zip((a, b), _RUN_COLOURS, strict=True)
    ]
    prop = {"family": _font_families(), "size": 9}
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, frameon=False, prop=prop)


def _draw_loss(history: History) -> Figure | None:
    steps = history.steps
    if not steps.has("loss"):
        return None
    segments = [s for s in SEGMENTS if steps.has(f"segment.{s}")]
    figure, axes = _figure(2 if segments else 1, height=3.2)
    _line(axes[0], steps, "loss", colour="black", label="total")
    for name, label, colour in (("loss_text", "text", _SKY), ("loss_action", "action head", _PURPLE)):
        if steps.has(name):
            _line(axes[0], steps, name, colour=colour, label=label)
    axes[0].set_ylabel("loss")
    for segment in segments:
        _line(
            axes[1], steps, f"segment.{segment}", colour=_SEGMENT_COLOURS[segment], label=SEGMENTS[segment], faint=0.12
        )
    if segments:
        axes[1].set_ylabel("text loss by segment")
    for ax in axes:
        _mark_attempts(ax, steps)
        _legend(ax)
    axes[-1].set_xlabel("step")
    return figure


def _draw_accuracy(history: History) -> Figure | None:
    table = history.evaluations
    if not table.has("action_accuracy"):
        return None
    figure, (ax,) = _figure(1, height=3.0)
    _line(ax, table, "action_accuracy", colour=_BLUE, label="action head", marker=True)
    if table.has("macro_f1"):
        _line(ax, table, "macro_f1", colour=_GREEN, label="macro F1", marker=True)
    if table.has("majority_accuracy"):
        # Of one evaluation a line would be a point under the other one.
        known = [v for v in table.column("majority_accuracy") if math.isfinite(v)]
        ax.axhline(known[-1], color=_GREY, linestyle="--", linewidth=1.3, label="always the majority class")
    ax.set_ylim(-0.03, 1.03)
    ax.set_xlim(left=0)
    ax.set_ylabel("accuracy, F1")
    ax.set_xlabel("step")
    _legend(ax)
    return figure


def _draw_speed(history: History) -> Figure | None:
    steps = history.steps
    names = [n for n in ("step_time_s", "samples_per_s") if steps.has(n)]
    if not names:
        return None
    figure, axes = _figure(len(names), height=2.4)
    labels = {"step_time_s": "s/step", "samples_per_s": "samples/s"}
    for ax, name in zip(axes, names, strict=True):
        _line(ax, steps, name, colour=_BLUE, label=labels[name])
        ax.set_ylabel(labels[name])
        ax.set_ylim(bottom=0)
        _mark_attempts(ax, steps)
    axes[-1].set_xlabel("step")
    return figure


def _draw_ranks(history: History) -> Figure | None:
    """A panel for each value that the ranks tell; values that are all 0 (no GPU) are none."""
    steps = history.steps
    columns = {value: [n for n in steps.names if n.startswith(f"{value}.")] for value in RANK_VALUES}
    panels = [v for v, names in columns.items() if any(x > 0 for n in names for x in steps.column(n))]
    if not panels:
        return None
    import matplotlib

    figure, axes = _figure(len(panels), height=2.6)
    colours = matplotlib.colormaps["viridis"]
    for ax, value in zip(axes, panels, strict=True):
        names = columns[value]
        # Of many ranks the one that stands out has a name, and those at the ends of the colours.
        medians = [statistics.median(finite(steps.column(n)) or [-math.inf]) for n in names]
        named = {0, len(names) - 1, medians.index(max(medians))}
        for i, name in enumerate(names):
            colour = colours(0.9 * i / max(1, len(names) - 1))
            label = f"rank {i}" if len(names) <= _MANY_RANKS or i in named else None
            _line(ax, steps, name, colour=colour, label=label, faint=0.0 if len(steps) >= _MIN_SMOOTHED else 1.0)
        ax.set_ylabel(_RANK_LABELS[value])
        ax.set_ylim(bottom=0)
        _legend(ax)
    axes[-1].set_xlabel("step")
    return figure


def _draw_timeline(history: History) -> Figure | None:
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
    figure, axes = _figure(len(heights) + 1, heights=[*heights, 0.9 + 0.42 * len(attempts)])
    lanes = axes[-1]
    for progress in axes[:-1]:
        x_steps = [x(t) for t in steps.column("time")]
        progress.plot(x_steps, list(steps.column("step")), color=_BLUE, linewidth=1.6, drawstyle="steps-post")
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
        color=_STATE_COLOURS.get(attempt.state, _GREY),
        hatch=None if is_over else "//",
        edgecolor="white",
        zorder=2,
    )


def _timeline_legend(figure: Figure, ax: Axes, attempts: Sequence[Attempt], *, has_checkpoints: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = list(ax.get_legend_handles_labels()[0])
    if has_checkpoints:
        handles.append(Line2D([], [], marker="|", linestyle="", color=_GREY, label="checkpoint", markersize=9))
    for state in dict.fromkeys(a.state for a in attempts):
        handles.append(Patch(color=_STATE_COLOURS.get(state, _GREY), label=state.lower()))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)


def _is_placed(event: Any, attempts: Sequence[Attempt]) -> bool:
    return math.isfinite(event.time) and any(a.number == event.attempt for a in attempts)


def _figure(
    num_panels: int, *, height: float = 2.5, heights: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """Panels below each other on one x axis. Units: inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    inches = list(heights) if heights else [height] * num_panels
    figure = Figure(figsize=(_WIDTH, sum(inches) + 0.4), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(num_panels, 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": inches})
    axes: list[Axes] = [row[0] for row in grid]
    for ax in axes:
        ax.grid(visible=True, color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return figure, axes


def _line(
    ax: Axes,
    table: Table,
    name: str,
    *,
    colour: Any,
    label: str | None,
    marker: bool = False,
    faint: float = 0.3,
    width: float = 1.6,
) -> None:
    """The column over the steps, a line for each attempt; over many points their running median."""
    is_first = True
    for begin, end in _attempt_slices(table):
        x, y = list(table.column("step")[begin:end]), list(table.column(name)[begin:end])
        is_smoothed = len(table) >= _MIN_SMOOTHED and not marker
        if is_smoothed and faint:
            ax.plot(x, y, color=colour, alpha=faint, linewidth=0.8)
        shown = _running_median(y, width=max(5, len(table) // 60)) if is_smoothed else y
        # A line needs two points.
        has_marker = "o" if marker or end - begin == 1 else None
        shown_label = label if is_first else None
        ax.plot(x, shown, color=colour, linewidth=width, marker=has_marker, markersize=4, label=shown_label)
        is_first = False


def _attempt_slices(table: Table) -> list[tuple[int, int]]:
    """Where rows of one attempt begin and end."""
    attempts = table.column("attempt")
    cuts = [i for i in range(1, len(attempts)) if attempts[i] != attempts[i - 1] and math.isfinite(attempts[i])]
    return list(zip([0, *cuts], [*cuts, len(table)], strict=True)) if len(table) else []


def _running_median(values: Sequence[float], *, width: int) -> list[float]:
    half = width // 2
    smooth = []
    for i in range(len(values)):
        # As wide to both sides: a lopsided window at an attempt's end would look like a jump of the loss.
        reach = min(half, i, len(values) - 1 - i)
        near = [v for v in values[i - reach : i + reach + 1] if math.isfinite(v)]
        smooth.append(statistics.median(near) if near else math.nan)
    return smooth


def _mark_attempts(ax: Axes, table: Table) -> None:
    """A dotted line at the first step of every attempt after the first."""
    # Labels nearer than a tenth of the axis would lie on each other.
    labelled, num_steps = -math.inf, max([1.0, *finite(table.column("step"))])
    for begin, _ in _attempt_slices(table)[1:]:
        step, attempt = table.column("step")[begin], table.column("attempt")[begin]
        ax.axvline(step, color=_GREY, linestyle=":", linewidth=1)
        if step - labelled < 0.1 * num_steps:
            continue
        labelled = step
        ax.annotate(
            f"attempt {attempt:.0f}", (step, 1), xycoords=("data", "axes fraction"), xytext=(3, -2),
            textcoords="offset points", va="top", fontsize=8, color="#555555",
        )  # fmt: skip


def _legend(ax: Axes) -> None:
    if ax.get_legend_handles_labels()[0]:
        # Outside: inside, it would lie on a curve sooner or later.
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9)


def _scale_step_times(ax: Axes, a: History, b: History) -> None:
    """A logarithmic axis where one run is more than ten times as slow as the other."""
    from matplotlib.ticker import FormatStrFormatter

    values = [v for h in (a, b) for v in h.steps.column("step_time_s") if math.isfinite(v) and v > 0]
    if values and max(values) > 10 * min(values):
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    else:
        ax.set_ylim(bottom=0)


def _time_unit(span_s: float) -> tuple[float, str]:
    if span_s < 300:
        return 1.0, "seconds"
    return (60.0, "minutes") if span_s < 3 * 3600 else (3600.0, "hours")


def _font_families() -> list[str]:
    """matplotlib's own font, and those here that have Chinese signs."""
    from matplotlib import font_manager

    known = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _CHINESE_FONTS if name in known)]


def _shorten(text: str, width: int = 34) -> str:
    return text if len(text) <= width else f"{text[: width // 2 - 1]}…{text[-width // 2 :]}"


def _to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A name for which no font here has the signs stands in the page, where the reader's fonts have them.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
