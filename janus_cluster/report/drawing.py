"""How pictures are drawn: panels, lines with one part an attempt, colours, fonts, PNG.

matplotlib is imported when a picture is drawn, and never through pyplot: no window, no state between pictures.
"""

from __future__ import annotations

import io
import math
import statistics
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from janus_cluster.errors import JanusError
from janus_cluster.report.table import Table, finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can distinguish; the yellow is too pale for a line.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
GREY = "#7f7f7f"
_WIDTH = 9.0
_DPI = 110
# Fewer points than that are drawn as they are; of more, a running median is drawn over them.
MIN_SMOOTHED = 40
_CHINESE_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei"),
    *("SimHei", "Microsoft YaHei", "PingFang SC"),
)


def require_matplotlib() -> None:
    """matplotlib can be imported. Raises: JanusError with what to install."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as e:
        raise JanusError(f"pictures need matplotlib: {e}", hint="pip install 'janus-cluster[report]'") from e


def build_figure(
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


def draw_line(
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
        is_smoothed = len(table) >= MIN_SMOOTHED and not marker
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


def mark_attempts(ax: Axes, table: Table) -> None:
    """A dotted line at the first step of every attempt after the first."""
    # Labels nearer than a tenth of the axis would overlap.
    labelled, num_steps = -math.inf, max([1.0, *finite(table.column("step"))])
    for begin, _ in _attempt_slices(table)[1:]:
        step, attempt = table.column("step")[begin], table.column("attempt")[begin]
        ax.axvline(step, color=GREY, linestyle=":", linewidth=1)
        if step - labelled < 0.1 * num_steps:
            continue
        labelled = step
        ax.annotate(
            f"attempt {attempt:.0f}", (step, 1), xycoords=("data", "axes fraction"), xytext=(3, -2),
            textcoords="offset points", va="top", fontsize=8, color="#555555",
        )  # fmt: skip


def add_legend(ax: Axes) -> None:
    if ax.get_legend_handles_labels()[0]:
        # Outside: inside, it would sooner or later cover a curve.
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9)


def font_families() -> list[str]:
    """matplotlib's own font, and those here that have Chinese signs."""
    from matplotlib import font_manager

    known = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _CHINESE_FONTS if name in known)]


def render_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A name for which no font here has the signs is in the page, where the reader's fonts have them.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
