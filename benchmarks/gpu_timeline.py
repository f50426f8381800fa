"""Time by part: marks on the GPU's own clock, or the host's where there is no GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Timeline:
    """Parts may be nested; each moment belongs to the innermost. Without a device nothing is recorded."""

    def __init__(self, device: str | None) -> None:
        self._device = device
        self._open: list[str] = []
        self._marks: list[tuple[str | None, Any]] = []

    def enter(self, part: str) -> None:
        """Time belongs to `part` from here on."""
        self._open.append(part)
        self._mark()

    def leave(self) -> None:
        """Time belongs to the part around the innermost one again."""
        self._open.pop()
        self._mark()

    def rename(self, part: str) -> None:
        """What is left of the innermost part's time belongs to `part`."""
        if self._open:
            self._open[-1] = part
            self._mark()

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """`enter`, and `leave` at the end."""
        self.enter(part)
        try:
            yield
        finally:
            self.leave()

    def _mark(self) -> None:
        if self._device is None:
            return
        stamp: Any = time.perf_counter()
        if self._device == "cuda":
            stamp = torch.cuda.Event(enable_timing=True)
            stamp.record()
        self._marks.append((self._open[-1] if self._open else None, stamp))

    def seconds(self) -> dict[str, float]:
        """Seconds of every part, in the order of their first marks."""
        if self._device == "cuda":
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for (part, begun), (_, ended) in zip(self._marks, self._marks[1:], strict=False):
            if part is not None:
                lasted = begun.elapsed_time(ended) / 1e3 if self._device == "cuda" else ended - begun
                found[part] = found.get(part, 0.0) + lasted
        return found
