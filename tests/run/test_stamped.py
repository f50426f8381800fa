"""Lines with their times, printed by processes of their own into one file, as ranks and agents do."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from janus_cluster.run.stamped import render_stamp, split_stamp, strip_stamps

STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z "


def run(path: Path, body: str, *, code: int = 0) -> list[str]:
    """The lines that a process left in `path`, whose two streams go there."""
    program = f"import sys\nfrom janus_cluster.run.stamped import stamp_output\n{body}"
    with path.open("ab") as log:
        done = subprocess.run([sys.executable, "-c", program], stdout=log, stderr=log, check=False, timeout=600)
    assert done.returncode == code, path.read_text()
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def test_every_line_that_python_prints_begins_with_its_time(tmp_path: Path) -> None:
    before = time.time()
    lines = run(
        tmp_path / "a.log",
        "import logging, os, warnings\n"
        "logging.getLogger('x').addHandler(logging.StreamHandler(sys.stdout))\n"
        "stamp_output()\n"
        "print('one\\ntwo'); print(); print('a', end=''); sys.stdout.flush(); print('b \\ud800 é')\n"
        "logging.getLogger('x').warning('of a logger made before')\n"
        "os.write(1, b'of C code\\n')\n"
        "raise ValueError('bad\\nthing')",
        code=1,
    )
    assert [line for line in lines if not re.match(STAMP, line)] == ["of C code"]
    reported = strip_stamps("\n".join(lines)).split("\n")
    assert reported[:6] == ["one", "two", "", "ab \\ud800 é", "of a logger made before", "of C code"]
    assert reported[6] == "Traceback (most recent call last):" and reported[-2:] == ["ValueError: bad", "thing"]
    when, rest = split_stamp(lines[0].encode())
    assert when is not None and before - 0.001 <= when <= time.time() and rest == b"one"


def test_a_progress_bar_is_one_line_with_one_time_and_others_do_not_end_in_it(tmp_path: Path) -> None:
    lines = run(
        tmp_path / "a.log",
        "stamp_output()\n"
        "def bar(text): sys.stderr.write(text); sys.stderr.flush()\n"
        "bar('\\r 1%'); bar('\\r 2%'); print('between'); bar('\\r 3%'); print('on the same stream', file=sys.stderr)\n"
        "bar('\\r 4%'); bar('\\n')",
    )
    # newline translation of the reader is off: a carriage return is a part of its line
    raw = (tmp_path / "a.log").read_bytes().decode().split("\n")[:-1]
    assert [re.sub(STAMP, "T ", line) for line in raw] == [
        "T \r 1%\r 2%", "T between", "T \r 3%", "T on the same stream", "T \r 4%",
    ]  # fmt: skip
    assert lines


@pytest.mark.slow
def test_lines_of_threads_and_processes_that_share_a_file_stay_whole(tmp_path: Path) -> None:
    lines = run(
        tmp_path / "a.log",
        "import os, threading\n"
        "stamp_output()\n"
        "pids = [os.fork() for _ in range(2)]\n"
        "def work(name):\n"
        "    for i in range(500): print(f'{name} {i} ' + 'x' * 200)\n"
        "threads = [threading.Thread(target=work, args=(f'{os.getpid()}.{n}',)) for n in range(2)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "[os.waitpid(pid, 0) for pid in pids if pid and 0 not in pids]",
    )
    assert len(lines) == 4 * 2 * 500
    assert all(re.fullmatch(STAMP + r"\d+\.[01] \d+ x{200}", line) for line in lines)


@pytest.mark.slow
def test_a_signal_handler_may_print_while_a_line_is_being_printed(tmp_path: Path) -> None:
    lines = run(
        tmp_path / "a.log",
        "import signal\n"
        "stamp_output()\n"
        "signal.signal(signal.SIGALRM, lambda *_: print('handler'))\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)\n"
        "for i in range(5000): print('line')\n"
        "signal.setitimer(signal.ITIMER_REAL, 0)",
    )
    assert sum(line.count("line") for line in lines) == 5000 and any("handler" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("2026-11-21T14:01:43.623Z step 3/20", "step 3/20"),
        ("2026-11-21T14:01:43.623Z   indented", "  indented"),
        ("2026-11-21T14:01:43.623Z", ""),
        ("2026-11-21T14:01:43.623Z \nnext", "\nnext"),
        ("2026-11-21T14:01:43 no stamp of ours", "2026-11-21T14:01:43 no stamp of ours"),
        ("printed at 2026-11-21T14:01:43.623Z by it", "printed at 2026-11-21T14:01:43.623Z by it"),
    ],
)
def test_only_a_stamp_at_the_beginning_is_taken_off(text: str, shown: str) -> None:
    assert strip_stamps(text) == shown


def test_a_stamp_is_read_as_it_was_written() -> None:
    assert render_stamp(1795269703.6239) == "2026-11-21T14:01:43.623Z"
    assert split_stamp(b"2026-11-21T14:01:43.623Z step") == (1795269703.623, b"step")
    assert split_stamp(b"2026-13-41T14:01:43.623Z no day") == (None, b"2026-13-41T14:01:43.623Z no day")
