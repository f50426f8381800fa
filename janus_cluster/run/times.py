"""Times as people read them."""

from __future__ import annotations


def render_duration(seconds: float) -> str:
    """`42 s`, `12 min`, `3 h 05 min`, `2 d 4 h`."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 3 * 3600:
        return f"{whole // 60} min"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def render_age(since: float, *, now: float) -> str:
    """`12 min ago`; 0 s where the other machine's clock is ahead of this one's."""
    return f"{render_duration(max(0.0, now - since))} ago"
