"""What the attempt says: lines in batch.log."""

from __future__ import annotations

import contextlib


def say(text: str) -> None:
    """One line in batch.log, at once, if that can be written: a full disk must not end the attempt."""
    with contextlib.suppress(OSError):
        print(text, flush=True)
