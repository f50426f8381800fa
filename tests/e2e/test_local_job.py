"""The same job without Slurm: two simulated nodes on this machine, ended on purpose and by its own errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from janus_cluster.rundir import RunDir

pytestmark = pytest.mark.train

Janus = Callable[..., subprocess.CompletedProcess[str]]
PREFLIGHT = ("preflight", "demo", "--cluster", "local", "--nodes", "2", "--set", "preflight.min_free_gb=0.1")


@pytest.fixture
def janus(tmp_path: Path) -> Janus:
    (tmp_path / "demo_data" / "episode").mkdir(parents=True)
    # Enough for the gate, which counts and decodes; only the ranks find out that no sample can be made of it.
    (tmp_path / "demo_data" / "episode" / "step_0_STOP.json").write_text("{}")

    def call(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "janus_cluster.cli", *argv],
            cwd=tmp_path,
            env=os.environ | {"JANUS_HOME": str(tmp_path / "home"), "DEMO_DATA": "demo_data"},
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )

    return call


def only_run(tmp_path: Path) -> RunDir:
    (folder,) = (tmp_path / "home" / "runs").glob("[!.]*")
    return RunDir(folder)


def test_the_gate_runs_on_two_simulated_nodes(janus: Janus, tmp_path: Path) -> None:
    done = janus(*PREFLIGHT, "--json")
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)
    assert (verdict["verdict"], list(verdict["nodes"])) == ("PASS", ["local-01", "local-02"])
    for results in verdict["nodes"].values():
        assert {r["id"] for r in results} >= {"reported", "paths.data", "versions", "all_reduce"}
    assert only_run(tmp_path).status_json.exists()


def test_a_stop_signal_from_before_the_attempt_ends_it(janus: Janus, tmp_path: Path) -> None:
    done = janus("submit", "demo", "--cluster", "local", "--dry-run", "--json", "--set", "preflight.min_free_gb=0.1")
    run = RunDir(Path(json.loads(done.stdout)["run_dir"]))
    environ = os.environ | {"JANUS_LAUNCHER": "local", "JANUS_STOP_SIGNAL": "USR1"}
    done = subprocess.run(["bash", str(run.job_sbatch)], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 13, done.stdout + done.stderr
    status = json.loads(run.status_json.read_text())
    assert (status["state"], status["signal"]) == ("STOPPED", 10)
    assert "SIGUSR1" in status["reason"]


def test_a_failed_gate_ends_with_2_and_names_the_check(janus: Janus) -> None:
    done = janus(*PREFLIGHT, "--set", "preflight.require_paths=[/no/such/place]")
    assert done.returncode == 2
    assert "paths.required" in done.stdout
    assert "/no/such/place" in done.stdout


def test_a_machine_without_gpus_never_passes_as_an_h800_node(janus: Janus) -> None:
    done = janus("preflight", "--local", "--set", "preflight.min_free_gb=0.1")
    assert done.returncode in (2, 3)
    assert "hca.rails" in done.stdout


def test_a_failed_training_ends_with_12_and_says_where_the_logs_are(janus: Janus, tmp_path: Path) -> None:
    """The data folder holds no episode that could be used, which only the ranks find out."""
    argv = ("--cluster", "local", "--nodes", "1", "--follow", "--set", "preflight.min_free_gb=0.1")
    done = janus("submit", "demo", *argv)
    assert done.returncode == 12, done.stdout + done.stderr
    run = only_run(tmp_path)
    assert str(run.attempt_logs(1)) in done.stdout
    assert json.loads(run.status_json.read_text())["state"] == "FAILED"
