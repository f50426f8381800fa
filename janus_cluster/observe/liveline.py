"""Output of tail: lines, and on a terminal one live line below them that is rewritten in place."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TextIO

from janus_cluster.observe.progress import Progress

_ERASE = "\r\x1b[2K"
# Shown when a step takes this many times as long as the last one did.
_STALE_STEPS = 3
_STALE_S = 60.0


class Screen:
    """A terminal, where lines go above the live line, or a pipe or file, which gets the lines alone and no escapes."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        is_terminal = out.isatty()
        self.has_colours = is_terminal and not os.environ.get("NO_COLOR")
        self.can_live = is_terminal and os.environ.get("TERM", "dumb") != "dumb"
        self._live = ""
        self._drawn = ""

    def write(self, lines: Sequence[str]) -> None:
        """Print the lines above the live line."""
        if lines:
            self._erase()
            # One call: an unbuffered stream (PYTHONUNBUFFERED) would make a system call of every line.
            self._out.write("\n".join([*lines, ""]))

    def show(self, live: str) -> None:
        """Show `live` as the live line, where there can be one; empty for none."""
        self._live = live if self.can_live else ""

    def flush(self) -> None:
        """Flush the output."""
        shown = self._cut(self._live)
        if shown != self._drawn:
            self._erase()
            self._out.write(shown if not self.has_colours or not shown else f"\x1b[1m{shown}\x1b[0m")
            self._drawn = shown
        self._out.flush()

    def leave(self) -> None:
        """Turn the live line into an ordinary one: it is not rewritten any more."""
        live, self._live = self._live, ""
        self.write([live] if live else [])
        self.flush()

    def _erase(self) -> None:
        if self._drawn:
            self._out.write(_ERASE)
            self._drawn = ""

    def _cut(self, text: str) -> str:
        """Cut the text to one row: a live line that wraps cannot be erased."""
        if not text:
            return ""
        try:
            columns = os.get_terminal_size(self._out.fileno()).columns
        except (OSError, ValueError):
            columns = 80
        return text if len(text) < columns else text[: max(0, columns - 2)] + "…"


def render_progress(progress: Progress, *, now: float) -> str:
    """`step 12/20 · 54.70 s/step · 1.17 samples/s · loss 1.2340 · ETA 7 min · GPU memory 61.2 to 78.0 GB`.

    Empty before the first logged step. The memory is the peak of the rank that needs least and of the one that needs
    most.
    """
    from janus_cluster.run.times import render_duration

    if progress.step is None:
        return ""
    parts = [f"step {progress.step}/{progress.total_steps or '?'}"]
    if progress.step_time_s is not None:
        parts.append(f"{progress.step_time_s:.2f} s/step")
    if progress.samples_per_s is not None:
        parts.append(f"{progress.samples_per_s:.2f} samples/s")
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    if progress.eta_s:
        parts.append(f"ETA {render_duration(progress.eta_s)}")
    memory_gb = progress.ranks.get("gpu_memory_peak_gb", ())
    if memory_gb and max(memory_gb) > 0:
        low, high = f"{min(memory_gb):.1f}", f"{max(memory_gb):.1f}"
        parts.append(f"GPU memory {low} to {high} GB" if len(memory_gb) > 1 else f"GPU memory {high} GB")
    age_s = now - progress.time if progress.time is not None else 0.0
    if age_s > max(_STALE_S, _STALE_STEPS * (progress.step_time_s or 0.0)):
        parts.append(f"last record {render_duration(age_s)} ago")
    return " · ".join(parts)


def render_start(starts_at: float | None, *, now: float) -> str:
    """`expected start 14:05 (in 12 min)`, in local time; empty where Slurm has no expected start."""
    from janus_cluster.run.times import render_duration

    if starts_at is None:
        return ""
    form = "%H:%M" if abs(starts_at - now) < 12 * 3600 else "%a %d %b %H:%M"
    when = time.strftime(form, time.localtime(starts_at))
    return f"expected start {when}" + (f" (in {render_duration(starts_at - now)})" if starts_at > now else "")
