"""The record of bad nodes and resume, on a real Slurm."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from janus_cluster.run.files import read_json
from janus_cluster.run.paths import RunDir
from janus_cluster.sandbox import SandboxInfo
from tests.tiny_data import write_tiny_data

pytestmark = pytest.mark.slurm

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def janus(sandbox: SandboxInfo, tmp_path: Path) -> Run:
    """janus-cluster with a home of its own that knows the session's sandbox."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "sandbox").symlink_to(sandbox.home)
    write_tiny_data(tmp_path / "demo_data")

    def call(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "janus_cluster.cli", *argv],
            cwd=tmp_path,
            env=os.environ | {"JANUS_HOME": str(home)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )

    return call


@pytest.fixture
def run(janus: Run) -> RunDir:
    """A run folder for one node whose script only sleeps."""
    done = janus("submit", "demo", "--nodes", "1", "--cluster", "sandbox", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    found = RunDir(Path(json.loads(done.stdout)["run_dir"]))
    head = [line for line in found.bundle(1).job_sbatch.read_text().splitlines() if line.startswith("#")]
    found.bundle(1).job_sbatch.write_text("\n".join([*head, "echo it runs", "sleep 600"]) + "\n")
    return found


def state(janus: Run, run: RunDir) -> str:
    return str(json.loads(janus("status", run.name, "--json").stdout)["state"])


def wait_for(janus: Run, run: RunDir, wanted: str) -> None:
    deadline = time.monotonic() + 60
    while (found := state(janus, run)) != wanted:
        assert time.monotonic() < deadline, found
        time.sleep(0.5)


def wait_for_words(run: RunDir, count: int) -> None:
    """Slurm reports RUNNING a moment before the script's first line."""
    deadline = time.monotonic() + 60
    while not run.batch_log.exists() or run.batch_log.read_text().count("it runs") < count:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def show(sandbox: SandboxInfo, job_id: str) -> str:
    argv = ["scontrol", "show", "job", job_id]
    return subprocess.run(
        argv, env=os.environ | sandbox.env(), capture_output=True, text=True, check=True, timeout=600
    ).stdout


def test_a_cancelled_job_is_resumed_in_its_folder_away_from_a_node_that_went_bad(
    janus: Run, run: RunDir, sandbox: SandboxInfo
) -> None:
    assert janus("resume", run.name).returncode == 0
    first = str(read_json(run.submission_json)["job_id"])
    wait_for(janus, run, "RUNNING")
    wait_for_words(run, 1)
    refused = janus("resume", run.name)
    assert refused.returncode == 2, refused.stdout
    assert "two jobs would write into one run folder" in refused.stderr
    assert janus("cancel", first).returncode == 0
    wait_for(janus, run, "CANCELLED")
    assert "ended by a user" in janus("status", run.name).stdout
    added = janus("nodes", "add", "h800-01", "--reason", "fan broken", "--cluster", "sandbox")
    assert added.returncode == 0, added.stderr
    done = janus("resume", run.name)
    assert done.returncode == 0, done.stderr
    assert "h800-01 is left out: by hand: fan broken" in done.stdout
    record: dict[str, Any] = read_json(run.submission_json)
    try:
        assert record["job_id"] != first
        assert [h["job_id"] for h in record["history"]] == [first]
        shown = show(sandbox, record["job_id"])
        assert "ExcNodeList=h800-01" in shown
        assert f"Command={run.bundle(1).job_sbatch}" in shown
        wait_for(janus, run, "RUNNING")
        assert "NodeList=h800-02" in show(sandbox, record["job_id"])
        # The first attempt's words are still there: a resumed job appends.
        wait_for_words(run, 2)
    finally:
        janus("cancel", record["job_id"], "--yes")
    wait_for(janus, run, "CANCELLED")


def test_a_submission_leaves_out_what_it_can_spare_and_reports_it(janus: Run, sandbox: SandboxInfo) -> None:
    janus("nodes", "add", "h800-02", "--reason", "fan broken", "--cluster", "sandbox")
    argv = ("submit", "demo", "--cluster", "sandbox", "--set", "slurm.hold=true")
    for nodes, excluded, words in (
        ("1", "h800-02", "h800-02 is left out: by hand: fan broken"),
        ("2", "", "without it fewer than 2 nodes are left: not left out, the gate judges it again"),
    ):
        done = janus(*argv, "--nodes", nodes)
        assert done.returncode == 0, done.stderr
        assert words in done.stdout
        job_id = re.search(r"^job id +(\d+)$", done.stdout, re.MULTILINE)
        assert job_id is not None, done.stdout
        try:
            assert (f"ExcNodeList={excluded}\n" in show(sandbox, job_id[1])) is bool(excluded)
        finally:
            janus("cancel", job_id[1])
    plain = janus(*argv, "--nodes", "1", "--dry-run", "--json", "--set", "preflight.use_node_memory=false")
    assert "--exclude" not in Path(json.loads(plain.stdout)["sbatch"]).read_text()
