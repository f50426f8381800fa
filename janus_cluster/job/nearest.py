"""The known names that a mistyped one may have meant."""

from __future__ import annotations

from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], *, cutoff: float = 0.6, most: int = 1, prefix: str = "") -> str:
    """`; did you mean partition?`, for the end of a message; empty where no known name is near. Each after `prefix`."""
    import difflib

    near = difflib.get_close_matches(name, sorted(known), n=most, cutoff=cutoff)
    return f"; did you mean {' or '.join(prefix + n for n in near)}?" if near else ""
