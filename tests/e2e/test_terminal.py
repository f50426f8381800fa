"""A two-node run as a person sees it: submit, follow, a requeue in the middle, Ctrl-C, and back to it with tail.

UPDATE_SCREENS=1 pytest tests/e2e/test_terminal.py     writes docs/images/terminal.svg anew, from the screen seen here
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text
from terminal import Terminal

from janus_cluster.sandbox import SandboxInfo

pytestmark = pytest.mark.slurm

IMAGE = Path(__file__).parents[2] / "docs" / "images" / "terminal.svg"
# rich's picture without the fonts that it would fetch from the network.
SVG = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
LIVE = r"^step (?P<step>\d+)/160 · [\d.]+ s/step · [\d.]+ samples/s · loss (?P<loss>[\d.]+) · ETA \d"
SUBMIT = (
    "janus-cluster submit demo --nodes 2 --cluster sandbox --follow --set training.max_steps=160"
    " --set training.logging_steps=2 --set checkpoint.every_steps=10 --set preflight.min_free_gb=0.1"
)


@pytest.fixture
def terminal(sandbox: SandboxInfo, tmp_path: Path) -> Iterator[Terminal]:
    """A shell in an empty folder with demo data, where janus-cluster is on PATH."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "janus-cluster"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m janus_cluster.cli "$@"\n')
    program.chmod(0o755)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "sandbox").symlink_to(sandbox.home)
    command = [sys.executable, "-m", "janus_cluster.janusvln.world.demo", str(tmp_path / "demo_data")]
    subprocess.run([*command, "--episodes", "6"], check=True, capture_output=True)
    environ = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}", "JANUS_HOME": str(tmp_path / "home")}
    with Terminal(tmp_path, environ) as opened:
        yield opened


def slurm(sandbox: SandboxInfo, *argv: str) -> str:
    done = subprocess.run(argv, env=os.environ | sandbox.env(), capture_output=True, text=True, check=True, timeout=600)
    return done.stdout


def begin_again(sandbox: SandboxInfo, job_id: str) -> None:
    """The requeued job does not wait for Slurm's two minutes; begun in the second of its requeue, slurmd refuses it."""
    while "PENDING" not in slurm(sandbox, "squeue", "--noheader", f"--jobs={job_id}", "--format=%T"):
        time.sleep(0.2)
    time.sleep(5)
    slurm(sandbox, "scontrol", "update", f"JobId={job_id}", "StartTime=now")


def test_submit_follow_requeue_leave_and_come_back(terminal: Terminal, sandbox: SandboxInfo) -> None:
    terminal.type(SUBMIT)
    job_id = terminal.wait_for_line(r"^job id +(\d+)")[1]
    try:
        watch_it_begin(terminal)
        watch_it_queued_again(terminal, sandbox, job_id)
        leave(terminal, sandbox, job_id)
        come_back(terminal, job_id)
    finally:
        slurm(sandbox, "scancel", job_id)


def watch_it_begin(terminal: Terminal) -> None:
    """What will run, then that the nodes are sound, then the loss and how long it will take, in the last line."""
    # Lines of logs are held back a moment, to be put in order; the live line is not.
    began = terminal.wait_for_line(rf"^h800-01:0 \| training: 0 of 160 steps done(?:.*\n)+?{LIVE}")
    seen = began.string
    places = [
        seen.index("ranks        2 nodes × 1 = 2, cpu"),
        seen.index("effective batch 8"),
        seen.index("── RUNNING on h800-01, h800-02 ──"),
        re.search(r"^batch \| preflight (PASS|WARN): \d+ PASS", seen, re.MULTILINE).start(),  # type: ignore[union-attr]
        seen.index("batch |   rail            8 sound"),
        seen.index("batch | training: 2 ranks, effective batch 8, from step 0"),
        began.start(),
        began.start("step"),
    ]
    assert places == sorted(places), seen
    assert "h800-01,02 | train: GLOO_SOCKET_IFNAME=ib0" in seen and "  ×2\n" in seen, (
        "one line of two nodes is one line"
    )
    later = terminal.wait_for(r"^step (?:2[4-9]|[3-9]\d|\d{3})/160 · .* loss ([\d.]+) · ETA ")
    assert float(later[1]) < float(began["loss"]), "the loss goes down"
    screen = terminal.screen().rstrip().splitlines()
    assert [line for line in screen if re.match(r"step \d+/160 ", line)] == screen[-1:], "one live line, the last one"
    coloured = re.findall(r"\x1b\[([39]\d)m(h800-01:0|h800-02:1|batch) \|", terminal.scrollback(with_colours=True))
    assert {label for _, label in coloured} == {"h800-01:0", "h800-02:1", "batch"}
    assert len(set(coloured)) == 3, "a source keeps its colour"
    if os.environ.get("UPDATE_SCREENS") == "1":
        write_picture(terminal)


def watch_it_queued_again(terminal: Terminal, sandbox: SandboxInfo, job_id: str) -> None:
    slurm(sandbox, "scontrol", "requeue", job_id)
    begin_again(sandbox, job_id)
    step = int(terminal.wait_for_line(r"^── attempt 2, on from step (\d+) ──")[1])
    assert step >= 10
    terminal.wait_for_line(rf"^h800-01:0 \| training: {step} of 160 steps done")
    seen = terminal.scrollback()
    assert re.search(rf"^── attempt 1 .*after step {step}, which is saved", seen, re.MULTILINE), seen
    assert seen.count("batch | preflight PASS") + seen.count("batch | preflight WARN") == 2, "the gate comes each time"
    terminal.wait_for(LIVE)


def leave(terminal: Terminal, sandbox: SandboxInfo, job_id: str) -> None:
    terminal.press("C-c")
    terminal.wait_for(r"^stopped watching; the job goes on\. janus-cluster cancel ")
    terminal.wait_for(r"^\$\s*\Z")
    assert re.search(rf"^{job_id} +demo-.* RUNNING +2 ", terminal.screen(), re.MULTILINE), terminal.screen()
    terminal.type('echo "code $?"')
    terminal.wait_for("^code 130$")
    assert slurm(sandbox, "squeue", "--noheader", f"--jobs={job_id}", "--format=%T").strip() == "RUNNING"


def come_back(terminal: Terminal, job_id: str) -> None:
    terminal.type(f"clear; janus-cluster tail {job_id}")
    again = terminal.wait_for(LIVE)
    assert int(again["step"]) > 10
    terminal.wait_for(r"^── COMPLETED \(exit code 0, source: ", limit_s=300)
    terminal.wait_for(r"^\$\s*\Z")
    terminal.type('echo "code $?"')
    terminal.wait_for("^code 0$")
    seen = terminal.screen()
    assert re.search(r"^step 160/160 · ", seen, re.MULTILINE), "the last live line stays"
    assert "batch | attempt 2: completed" in seen


def write_picture(terminal: Terminal) -> None:
    """README's picture is what the terminal shows now, from its first line."""
    width = terminal.columns
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
    for line in terminal.scrollback(with_colours=True).rstrip().splitlines():
        console.print(Text.from_ansi(line), overflow="fold", soft_wrap=False)
    IMAGE.parent.mkdir(exist_ok=True)
    IMAGE.write_text(console.export_svg(title="janus-cluster", code_format=SVG), encoding="utf-8")
