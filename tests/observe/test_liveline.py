from __future__ import annotations

import fcntl
import os
import pty
import struct
import termios
import time
from collections.abc import Iterator
from typing import TextIO

import pytest

from janus_cluster.observe.liveline import Screen, render_progress, render_start
from janus_cluster.observe.progress import Progress


class Terminal:
    """A pseudo-terminal of so many columns, and what was written to it."""

    def __init__(self, columns: int) -> None:
        self._parent, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.out: TextIO = os.fdopen(child, "w")

    def read(self) -> str:
        """What was written since the last time. It arrives in pieces; the NUL written here comes last."""
        self.out.write("\0")
        self.out.flush()
        shown = b""
        while not shown.endswith(b"\0"):
            shown += os.read(self._parent, 10_000)
        return shown.removesuffix(b"\0").decode()

    def close(self) -> None:
        self.out.close()
        os.close(self._parent)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal(40)
    yield terminal
    terminal.close()


def test_lines_go_above_the_live_line_which_is_drawn_anew(terminal: Terminal) -> None:
    screen = Screen(terminal.out)
    screen.show("step 1/9")
    screen.flush()
    screen.write(["a line"])
    screen.show("step 2/9")
    screen.flush()
    assert terminal.read() == "step 1/9\r\x1b[2Ka line\r\nstep 2/9"
    screen.flush()
    screen.leave()
    assert terminal.read() == "\r\x1b[2Kstep 2/9\r\n", "nothing is drawn that is there already"


def test_a_live_line_never_wraps(terminal: Terminal) -> None:
    screen = Screen(terminal.out)
    screen.show("x" * 100)
    screen.flush()
    assert terminal.read() == "x" * 38 + "…"


def test_a_terminal_that_cannot_erase_gets_no_live_line(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    screen = Screen(terminal.out)
    screen.show("step 1/9")
    screen.write(["a line"])
    screen.leave()
    assert terminal.read() == "a line\r\n"


PROGRESS = Progress(
    step=12, total_steps=20, loss=1.2345, step_time_s=54.7, samples_per_s=1.17, eta_s=437.6, time=1000.0,
    ranks={"gpu_memory_peak_gb": (61.24, 78.0, 70.0)},
)  # fmt: skip


def test_the_progress_line_has_step_speed_loss_eta_and_the_memory_of_the_ranks() -> None:
    assert render_progress(PROGRESS, now=1010.0) == (
        "step 12/20 · 54.70 s/step · 1.17 samples/s · loss 1.2345 · ETA 7 min · GPU memory 61.2 to 78.0 GB"
    )


@pytest.mark.parametrize(("age_s", "is_reported"), [(164.0, False), (165.0, True)])
def test_a_step_that_takes_three_times_as_long_is_reported(age_s: float, is_reported: bool) -> None:
    assert ("last record" in render_progress(PROGRESS, now=1000.0 + age_s)) is is_reported


def test_without_gpus_there_is_no_memory_and_before_the_first_step_nothing() -> None:
    on_cpu = Progress(step=1, total_steps=9, ranks={"gpu_memory_peak_gb": (0.0, 0.0)})
    assert render_progress(on_cpu, now=0) == "step 1/9"
    assert render_progress(Progress(), now=0) == ""


def test_an_expected_start_is_a_time_of_day_and_how_long_it_is_until_then() -> None:
    now = time.mktime((2026, 11, 21, 14, 1, 0, 0, 0, -1))
    assert render_start(now + 12 * 60, now=now) == "expected start 14:13 (in 12 min)"
    assert render_start(now + 30 * 3600, now=now) == "expected start Sun 22 Nov 20:01 (in 30 h 00 min)"
    assert render_start(now - 60, now=now) == "expected start 14:00"
    assert render_start(None, now=now) == ""
