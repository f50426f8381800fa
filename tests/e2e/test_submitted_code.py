"""The installed package is edited between submission and attempt: the submitted code runs, or a warning is printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from janus_cluster.job.resources import jobs_dir
from janus_cluster.run.paths import RunDir
from janus_cluster.run.snapshot import read_package, write_package
from tests.tiny_data import write_tiny_data

Janus = Callable[..., subprocess.CompletedProcess[str]]
# The attempt imports the one, the ranks import both.
ATTEMPT_FILE, RANK_FILE = "node/port.py", "janusvln/loss.py"
NOTHING_TO_DO = ("--set", "kind=preflight", "--no-preflight")


@pytest.fixture
def janus(tmp_path: Path) -> Janus:
    """janus-cluster from a copy of the package, which the test may edit."""
    write_package(read_package(), tmp_path / "installed")
    write_tiny_data(tmp_path / "demo_data")
    own = {"JANUS_HOME": str(tmp_path / "home"), "DEMO_DATA": str(tmp_path / "demo_data")}

    def call(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "janus_cluster.cli", *argv],
            cwd=tmp_path,
            env=os.environ | own | {"PYTHONPATH": str(tmp_path / "installed"), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )

    return call


def edit(tmp_path: Path, version: int) -> None:
    """The installed code prints its version, wherever it is imported."""
    for name, who in ((ATTEMPT_FILE, "attempt"), (RANK_FILE, "rank")):
        path = tmp_path / "installed" / "janus_cluster" / name
        text = path.read_text().split("\nprint(")[0]
        path.write_text(f'{text}\nprint("{who} runs code {version}", flush=True)\n')


def submit(janus: Janus, tmp_path: Path, *argv: str) -> RunDir:
    """A run on this machine that waits for the file `go`, and fails where there is a file `fail`."""
    setup = json.dumps([f"until [ -e {tmp_path}/go ]; do sleep 0.05; done", f"[ ! -e {tmp_path}/fail ]"])
    done = janus(
        "submit", str(jobs_dir() / "demo.yaml"), "--cluster", "local", "--nodes", "1", "--json",
        "--set", f"environment.setup={setup}", *argv,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return RunDir(Path(json.loads(done.stdout)["run_dir"]))


def end_of(janus: Janus, run: RunDir) -> int:
    """The exit code of the run, once it has ended."""
    return janus("tail", run.name).returncode


def logs(run: RunDir) -> str:
    return "\n".join(p.read_text(errors="replace") for p in run.logs.rglob("*") if p.is_file())


@pytest.mark.slow
def test_code_edited_while_a_run_waits_and_before_it_is_resumed_does_not_run(janus: Janus, tmp_path: Path) -> None:
    edit(tmp_path, 1)
    run = submit(janus, tmp_path, *NOTHING_TO_DO)
    edit(tmp_path, 2)
    (tmp_path / "fail").touch()
    (tmp_path / "go").touch()
    assert end_of(janus, run) != 0
    (tmp_path / "fail").unlink()
    edit(tmp_path, 3)
    assert janus("resume", run.name).returncode == 0
    assert end_of(janus, run) == 0, logs(run)
    assert "attempt runs code 1" in logs(run)
    assert "attempt runs code 2" not in logs(run)
    assert "attempt runs code 3" not in logs(run)
    assert "has changed" not in logs(run)


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "code"), [("warn", 0), ("fail", 2)])
def test_installed_code_that_was_edited_is_reported_or_refused(
    policy: str, code: int, janus: Janus, tmp_path: Path
) -> None:
    edit(tmp_path, 1)
    keys = ("--set", "environment.code=installed", "--set", f"environment.on_code_change={policy}")
    run = submit(janus, tmp_path, *NOTHING_TO_DO, *keys)
    assert not run.code.exists()
    edit(tmp_path, 2)
    (tmp_path / "go").touch()
    assert end_of(janus, run) == code, logs(run)
    reported = run.batch_log.read_text()
    assert "attempt runs code 2" in reported
    for word in ("has changed since it was submitted", ATTEMPT_FILE, RANK_FILE):
        assert word in reported
    assert ("warning: janus_cluster has changed" in reported) == (policy == "warn")
    shown = janus("status", run.name).stdout
    assert ("the job's environment is broken [environment]" in shown) == (policy == "fail"), shown
    assert json.loads(run.status_json.read_text())["exit_code"] == code


@pytest.mark.train
def test_every_rank_runs_the_submitted_code(janus: Janus, tmp_path: Path) -> None:
    edit(tmp_path, 1)
    short = ("--set", "training.max_steps=1", "--set", "checkpoint.export=false", "--set", "data.validation_fraction=0")
    ranks = ("--set", "hardware.processes_per_node=2")
    run = submit(janus, tmp_path, "--no-preflight", *short, *ranks)
    edit(tmp_path, 2)
    (tmp_path / "go").touch()
    assert end_of(janus, run) == 0, logs(run)
    assert logs(run).count("rank runs code 1") == 2
    assert "runs code 2" not in logs(run)
