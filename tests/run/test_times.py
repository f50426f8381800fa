from __future__ import annotations

import pytest

from janus_cluster.run.times import render_age, render_duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (119, "119 s"), (120, "2 min"), (3 * 3600 + 300, "3 h 05 min"), (50 * 3600, "2 d 2 h")],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert render_duration(seconds) == text


@pytest.mark.parametrize(("seconds", "text"), [(-5, "0 s ago"), (3000, "50 min ago"), (72 * 3600, "3 d 0 h ago")])
def test_ages_are_short(seconds: float, text: str) -> None:
    assert render_age(1e9, now=1e9 + seconds) == text
