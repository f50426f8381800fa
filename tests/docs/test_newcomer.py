"""A user who has only the README: after the demo, its lines do what is written there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pages import READMES, blocks
from run_files import read_metric_lines

from janus_cluster.run.paths import RunDir

pytestmark = [pytest.mark.train, pytest.mark.slow]

# `make demo` in a few steps; the real one is a minute of training.
DEMO = """
.venv/bin/python -m janus_cluster.janusvln.world.demo demo_data --episodes 6
DEMO_DATA=demo_data .venv/bin/janus-cluster submit demo --nodes 2 --cluster local --follow \\
  --set training.max_steps=4 --set preflight.min_free_gb=0.1
"""


def test_after_the_demo_its_run_is_shown_reported_and_a_failed_gate_understood(tmp_path: Path) -> None:
    (block,) = [b for b in blocks(READMES[0]) if b.needs == "the demo"]
    (tmp_path / ".venv").symlink_to(sys.prefix)
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}

    def bash(text: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=tmp_path,
            env=environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=1200,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "held-out action accuracy" in bash(DEMO)
    (trained,) = (tmp_path / "runs").glob("demo-*")
    output = bash(block.text)
    shown, _, refused = output.partition("report: ")
    assert f"{trained.name}  COMPLETED" in shown and "checkpoint-4" in shown
    page = Path(refused.splitlines()[0])
    assert page == RunDir(trained).report / "index.html"
    assert "data:image/png;base64" in page.read_text(), "the pictures are inside"
    assert "exit code 10" in refused.splitlines()
    assert "FAIL paths.required on local-01, local-02: " in refused
    assert "fix: on local-01: ls -ld /data/missing" in refused
    (second,) = {p.name for p in (tmp_path / "runs").glob("demo-*")} - {trained.name}
    assert not list(read_metric_lines(RunDir(tmp_path / "runs" / second))), "training never started"
