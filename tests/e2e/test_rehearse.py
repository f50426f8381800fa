"""`submit --rehearse` for real: on this machine, and on the sandbox's Slurm with a requeue of the same job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from run_files import read_metric_lines

from janus_cluster.run.paths import RunDir
from janus_cluster.sandbox import SandboxInfo

_NO_PROOF_OF = "the job can be stopped"
ROOM = ("--set", "preflight.min_free_gb=0.1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rehearse") / "demo_data"
    command = [sys.executable, "-m", "janus_cluster.janusvln.world.demo", str(folder), "--episodes", "4"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def rehearse(home: Path, data: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "janus_cluster.cli", "submit", "demo", "--rehearse", *ROOM, *argv],
        cwd=data.parent,
        env=os.environ | {"JANUS_HOME": str(home), "DEMO_DATA": str(data), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def trained(run: RunDir) -> list[tuple[int, int]]:
    return [(r["attempt"], r["step"]) for r in read_metric_lines(run) if r["kind"] == "train"]


def expect_exactness(run: RunDir, claims: Sequence[dict[str, Any]]) -> None:
    """metrics.jsonl itself, not the command's output, shows that no step was lost or repeated."""
    assert {c["state"] for c in claims[1:]} == {"proven"}, claims
    (stop,) = [r for r in read_metric_lines(run) if r["kind"] == "stop"]
    steps = trained(run)
    assert [step for _, step in steps] == list(range(1, 41))
    assert [step for attempt, step in steps if attempt == 1] == list(range(1, stop["step"] + 1))
    assert stop["step"] < 40


@pytest.mark.train
def test_a_rehearsal_on_this_machine_proves_that_the_run_goes_on(data: Path, tmp_path: Path) -> None:
    done = rehearse(tmp_path, data, "--cluster", "local", "--nodes", "1", "--no-preflight", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    value = json.loads(done.stdout)
    assert value["exit_code"] == 0
    expect_exactness(RunDir(Path(value["run_dir"])), value["claims"])
    assert value["claims"][0]["state"] == "not proven", "nothing is claimed for a gate that is off"
    assert "not proven  Slurm" in done.stderr
    assert "s from the signal to the checkpoint" in done.stderr


@pytest.mark.train
def test_a_failed_gate_ends_the_rehearsal_with_its_own_code_and_its_card(data: Path, tmp_path: Path) -> None:
    argv = ("--cluster", "local", "--nodes", "1", "--set", "preflight.require_paths=[/no/such/place]")
    done = rehearse(tmp_path, data, *argv)
    assert done.returncode == 10, done.stdout + done.stderr
    assert "FAILED      the gate lets these nodes train: attempt 1 FAIL" in done.stdout
    assert "paths.required" in done.stdout
    assert "rehearsal failed" in done.stdout
    assert _NO_PROOF_OF not in done.stdout


@pytest.mark.slurm
def test_a_rehearsal_on_slurm_is_requeued_as_the_same_job_and_goes_on(data: Path, sandbox: SandboxInfo) -> None:
    done = rehearse(Path(sandbox.home).parent, data, "--cluster", "sandbox", "--nodes", "2", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    value = json.loads(done.stdout)
    run = RunDir(Path(value["run_dir"]))
    expect_exactness(run, value["claims"])
    assert value["claims"][0]["evidence"] == "attempt 1 PASS, attempt 2 PASS"
    assert f"sent: scancel --batch --signal=USR1 {value['job_id']}" in done.stderr
    assert "the Slurm of your cluster" in done.stderr
    submission = json.loads(run.submission_json.read_text())
    assert submission["job_id"] == value["job_id"]
    assert submission["history"] == [], "Slurm queued it again; it was not submitted again"
