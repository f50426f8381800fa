"""What a viewer costs the file server while nothing is written."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from janus_cluster.run.paths import RunDir

# Looks as often as tail does at its busiest, and counts what is opened in the run folder in the last five seconds.
VIEWER = """
import io, sys, time
from pathlib import Path
from janus_cluster.observe.liveline import Screen
from janus_cluster.observe.tail_follow import Follower
from janus_cluster.observe.tail_view import View
from janus_cluster.run.paths import RunDir

run, opened = sys.argv[1], []
sys.addaudithook(lambda name, args: opened.append(args[0]) if name == "open" and str(args[0]).startswith(run) else None)
out = io.StringIO()
follower = Follower(RunDir(Path(run)), View(num_lines=1), Screen(out))
follower.print_last()
begin = time.monotonic()
while (still := time.monotonic() - begin) < 15:
    if still < 10:
        opened.clear()
    follower.print_new()
    time.sleep(0.5)
print(len(opened))
print(out.getvalue().count("late"))
"""


@pytest.mark.slow
def test_eighteen_logs_in_which_nothing_is_written_are_opened_ten_times_a_second_at_most(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.attempt_logs(1).mkdir(parents=True)
    names = [f"h800-0{node}{rank}.log" for node in (1, 2) for rank in ("", *(f".rank{8 * node + i}" for i in range(8)))]
    assert len(names) == 18
    for name in names:
        (run.attempt_logs(1) / name).write_text("a line\n")
    with subprocess.Popen([sys.executable, "-c", VIEWER, str(run.path)], stdout=subprocess.PIPE, text=True) as viewer:
        time.sleep(8)
        with (run.attempt_logs(1) / names[0]).open("a") as log:
            log.write("late\n")
        output, _ = viewer.communicate()
    num_opened, num_shown = map(int, output.split())
    assert 0 < num_opened <= 50
    assert num_shown == 1, "a line after a rest is shown"
