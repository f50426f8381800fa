"""The attempt's lines in batch.log."""

from __future__ import annotations

import contextlib


def log_line(text: str) -> None:
    """Print one line into batch.log at once, if that can be written: a full disk must not end the attempt."""
    with contextlib.suppress(OSError):
        print(text, flush=True)
