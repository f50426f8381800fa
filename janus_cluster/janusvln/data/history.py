"""Which earlier frames a sample shows."""

from __future__ import annotations

import numpy as np


def history_positions(current: int, max_history: int, *, pad: bool = False) -> tuple[int, ...]:
    """Positions of the frames to show, oldest first, with `current` as the last one.

    All frames up to the current one if they are `max_history` + 1 or fewer, else evenly spaced ones that start at 0.
    `pad` repeats frame 0 in front until there are `max_history` + 1: the predecessor's habit, which changes the
    spatial memory of a short history, for comparison only.
    """
    if current <= max_history:
        positions = tuple(range(current + 1))
    else:
        # endpoint apart: with max_history = 0, linspace would return frame 0 instead of the current one
        spaced = np.linspace(0, current, max_history + 1, dtype=int)[:-1]
        positions = (*(int(p) for p in spaced), current)
    missing = max_history + 1 - len(positions)
    return (0,) * missing + positions if pad else positions
