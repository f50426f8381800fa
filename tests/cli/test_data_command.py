"""janus-cluster data index: here, and as a job of its own."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from janus_cluster.janusvln.world.demo import write_demo

pytestmark = pytest.mark.slow

Run = Callable[..., "subprocess.CompletedProcess[str]"]
COMMAND = [sys.executable, "-m", "janus_cluster.cli", "data", "index"]


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    write_demo(tmp_path / "demo_data", num_episodes=4, seed=0)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MODEL", "DATA"))}
    return kept | {"JANUS_HOME": str(tmp_path / "home"), "DEMO_DATA": str(tmp_path / "demo_data"), "COLUMNS": "100"}


def run(environ: dict[str, str], *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *argv], env=environ, capture_output=True, text=True, check=False, timeout=600)


def test_the_index_is_written_where_training_looks_for_it_and_is_only_checked_then(tmp_path, environ):
    first, again = run(environ, "demo"), run(environ, "demo")
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    assert " of 4 episodes read in " in first.stdout and "index checked in" in again.stdout
    assert "tokens: not counted" in first.stdout
    assert first.stdout.splitlines()[-1] == f"index: {tmp_path / 'home' / 'runs' / '.data_index'}"
    reported = run(environ, "demo", "--json")
    value = json.loads(reported.stdout)
    assert value["samples"]["train"] > value["samples"]["held_out"] > 0 and "index checked in" in reported.stderr
    submitted = run(environ, "demo", "--submit", "--cluster", "local", "--follow")
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "index checked in" in submitted.stdout and "COMPLETED" in submitted.stdout
    (folder,) = (tmp_path / "home" / "runs").glob("demo-*")
    resolved = json.loads((folder / "resolved.json").read_text())
    assert "gres" not in resolved["sbatch_options"] and resolved["sbatch_options"]["cpus-per-task"] == "8"


def test_data_that_training_would_refuse_ends_with_2_here_and_as_a_job(tmp_path, environ):
    for path in list((tmp_path / "demo_data").glob("demo_*/step_*.json"))[:20]:
        path.write_text("{")
    here = run(environ, "demo")
    assert here.returncode == 2 and "samples cannot be used" in here.stderr and "next:" in here.stderr
    job = run(environ, "demo", "--submit", "--cluster", "local", "--follow")
    assert job.returncode == 2, job.stdout + job.stderr
    assert "the index was not made (exit code 2):" in job.stdout and "samples cannot be used" in job.stdout


def test_a_terminal_gets_a_bar(environ):
    leader, follower = pty.openpty()
    with subprocess.Popen([*COMMAND, "demo"], env=environ | {"TERM": "xterm"}, stdout=follower, stderr=follower) as job:
        os.close(follower)
        shown = b""
        while True:
            try:
                shown += os.read(leader, 65536)
            except OSError:
                break
    os.close(leader)
    assert job.returncode == 0, shown
    assert b"demo_data: 4 episodes" in shown and b"100%" in shown
