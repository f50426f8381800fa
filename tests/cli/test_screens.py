"""Every table on a terminal of 80, 100 and 160 columns: no line is wider, and no figure is cut or broken."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from run_files import append_metric_line

from janus_cluster.run.files import write_json_atomically
from janus_cluster.run.paths import RunDir
from janus_cluster.run.text import clean
from tests.tiny_data import write_tiny_data

pytestmark = pytest.mark.slow

COLUMNS = (80, 100, 160)
STEP = {
    "kind": "train", "attempt": 12, "step": 118_250, "total_steps": 120_000, "loss": 12.3456, "loss_text": 6.0,
    "loss_action": 1.0, "learning_rate": 1e-3, "grad_norm": 1.0, "step_time_s": 1055.25, "samples_per_s": 1234.56,
    "ranks": {"gpu_memory_peak_gb": [0.0, 0.0], "data_wait_s": [0.1, 0.2], "visual_tokens": [100, 300]},
}  # fmt: skip


def on_screen(columns: int, home: Path, *argv: str) -> str:
    """What the command prints on a terminal of so many columns."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 60, columns, 0, 0))
    environ = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-m", "janus_cluster.cli", *argv], stdin=its, stdout=its, stderr=its, cwd=home,
        env=environ | {"JANUS_HOME": str(home), "TERM": "xterm", "NO_COLOR": "1", "PATH": f"{home}/bin:{os.defpath}"},
    )  # fmt: skip
    os.close(its)
    parts = []
    try:
        while data := os.read(ours, 65536):
            parts.append(data)
    except OSError:
        # Linux: the last writer has closed the terminal.
        pass
    finally:
        os.close(ours)
    process.wait()
    return "\n".join(clean(line) for line in b"".join(parts).decode().replace("\r", "").split("\n"))


def make_run(home: Path, name: str, *, state: str, exit_code: int | None) -> RunDir:
    """A run of figures as wide as they come."""
    run = RunDir(home / "runs" / name)
    run.bundle(1).path.mkdir(parents=True)
    run.begin_attempt()
    job = {"name": "demo", "nodes": 2, "training": {"seed": len(name), "max_steps": 6}}
    write_json_atomically(run.bundle(1).resolved_json, {"job": job})
    sent = {"cluster": "local", "job_id": "local-99999999"}
    write_json_atomically(run.submission_json, sent | {"submitted_at": time.time() - 5})
    word = sent | {"attempt": 12, "nodes": ["h800-01", "h800-02"], "state": state, "exit_code": exit_code}
    write_json_atomically(run.status_json, word | {"started_at": time.time(), "updated_at": time.time()})
    append_metric_line(run, STEP | {"time": time.time()})
    return run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("screens")
    (folder / "bin").mkdir()
    write_tiny_data(folder / "demo_data")
    for name in ("squeue", "sacct", "scontrol", "sinfo"):
        (folder / "bin" / name).write_text("#!/bin/sh\nexit 1\n")
        (folder / "bin" / name).chmod(0o755)
    make_run(folder, "train_2node_lora-20261121T101112Z-aaaa", state="RUNNING", exit_code=None)
    make_run(folder, "train_2node-20261121T101113Z-bbbb", state="COMPLETED", exit_code=0)
    return folder


COMMANDS = (
    ("plan", "train_2node"),
    ("plan", "demo", "--nodes", "4"),
    ("status",),
    ("status", "train_2node-20261121T101113Z-bbbb"),
    ("list",),
    ("compare", "train_2node_lora-20261121T101112Z-aaaa", "train_2node-20261121T101113Z-bbbb"),
    ("nodes",),
    ("config", "show", "demo"),
    ("config", "check", "demo"),
    ("submit", "demo", "--cluster", "local", "--dry-run"),
    ("init",),
)


# Prose of a status and of a plan is folded at blanks; what can be copied is not.
def is_to_be_copied(line: str) -> bool:
    """A command, a path or a value: a terminal may wrap it, and it can be copied whole."""
    return bool(re.search(r"janus-cluster |(^|[ (])[./~]?/\S|^\S+ = |--set ", line))


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("argv", COMMANDS, ids=lambda argv: " ".join(argv)[:24])
def test_no_line_is_wider_than_the_terminal(home: Path, argv: tuple[str, ...], columns: int) -> None:
    screen = on_screen(columns, home, *argv)
    assert "Traceback" not in screen
    wide = [line for line in screen.splitlines() if len(line.rstrip()) > columns and not is_to_be_copied(line)]
    assert wide == []


@pytest.mark.parametrize("columns", COLUMNS)
def test_figures_of_a_status_are_whole_at_every_width(home: Path, columns: int) -> None:
    screen = on_screen(columns, home, "status", "train_2node-20261121T101113Z-bbbb")
    figures = ["118250/120000", "12.3456"] + (["1055.25"] if columns > 80 else [])
    assert [f for f in figures if f not in screen] == []


@pytest.mark.parametrize("columns", COLUMNS)
def test_figures_of_a_plan_are_whole_at_every_width(home: Path, columns: int) -> None:
    screen = on_screen(columns, home, "plan", "train_2node")
    whole = on_screen(400, home, "plan", "train_2node")
    figures = r"→ +\d+ +(zero\d\S*) +(\d+×\d+) .* (\d+\.\d) +yes +(\d+\.\d) +(\d+\.\d)"
    assert re.findall(figures, screen) == re.findall(figures, whole) != []
    heading = next(line for line in screen.splitlines() if line.lstrip().startswith("nodes"))
    dropped = re.search(r"no room for ([\w, \n]+)", screen)
    names = set(re.findall(r"\w+", dropped[1])) if dropped else set()
    everything = {"VGGT", "logits", "buffers", "optim", "grads", "params", "activ"}
    assert everything == {n for n in everything if n in heading.split()} | (names & everything)
    assert bool(names) == (columns < 160)
