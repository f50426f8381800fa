"""The same job without Slurm: two simulated nodes on this machine, ended on purpose and by its own errors."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from janus_cluster.run.paths import RunDir
from tests.tiny_data import write_tiny_data

pytestmark = pytest.mark.train

Janus = Callable[..., subprocess.CompletedProcess[str]]
PREFLIGHT = ("preflight", "demo", "--cluster", "local", "--nodes", "2", "--set", "preflight.min_free_gb=0.1")


@pytest.fixture
def janus(tmp_path: Path) -> Janus:
    write_tiny_data(tmp_path / "demo_data")
    # Enough for the gate, which counts and decodes; only the ranks find out that no sample can be made of it.

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
    done = subprocess.run(["bash", str(run.links.job_sbatch)], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 13, done.stdout + done.stderr
    status = json.loads(run.status_json.read_text())
    assert (status["state"], status["signal"]) == ("STOPPED", 10)
    assert "SIGUSR1" in status["reason"]


def test_ranks_that_end_with_0_before_all_steps_are_done_have_not_completed(janus: Janus, tmp_path: Path) -> None:
    hook = tmp_path / "hook" / "sitecustomize.py"
    hook.parent.mkdir()
    hook.write_text(
        "import os, sys\n"
        "if 'torch.distributed.run' not in sys.orig_argv and 'janus_cluster.training' in sys.orig_argv:\n"
        "    os._exit(0)\n"
    )
    world = [sys.executable, "-m", "janus_cluster.janusvln.world.demo", str(tmp_path / "episodes"), "--episodes", "4"]
    subprocess.run(world, check=True, capture_output=True, timeout=600)
    options = ("--cluster", "local", "--nodes", "1", "--no-preflight", "--follow", "--set", "data.roots=[episodes]")
    done = janus("submit", "demo", *options, "--set", f"environment.variables.PYTHONPATH={hook.parent}")
    assert done.returncode == 12, done.stdout + done.stderr
    assert "ended with exit code 0, but training recorded no completion" in done.stdout
    status = json.loads(only_run(tmp_path).status_json.read_text())
    assert status["state"] == "FAILED"
    assert janus("resume", only_run(tmp_path).name).returncode == 0


def test_a_failed_gate_ends_with_2_and_names_the_check(janus: Janus) -> None:
    done = janus(*PREFLIGHT, "--set", "preflight.require_paths=[/no/such/place]")
    assert done.returncode == 2
    assert "paths.required" in done.stdout
    assert "/no/such/place" in done.stdout


def test_a_machine_without_gpus_never_passes_as_an_h800_node(janus: Janus) -> None:
    done = janus("preflight", "--local", "--set", "preflight.min_free_gb=0.1")
    assert done.returncode in (2, 3)
    assert "hca.rails" in done.stdout


def test_a_failed_training_ends_with_12_and_shows_where_the_logs_are(janus: Janus, tmp_path: Path) -> None:
    """No sample is as short as the job wants it, which only the ranks find out."""
    argv = ("--cluster", "local", "--nodes", "1", "--follow", "--set", "preflight.min_free_gb=0.1")
    done = janus("submit", "demo", *argv, "--set", "data.max_length=64")
    assert done.returncode == 12, done.stdout + done.stderr
    run = only_run(tmp_path)
    assert str(run.attempt_logs(1)) in done.stdout
    assert json.loads(run.status_json.read_text())["state"] == "FAILED"


@pytest.mark.parametrize(
    ("kind", "timeouts", "limit_s"),
    [
        ("hang", ("training.hang_timeout_s=8",), 8 + 60),
        # The collective's own time-out comes first. It is also the limit for the ranks' start.
        pytest.param(
            *("nccl_timeout", ("training.ddp_timeout_s=90", "training.hang_timeout_s=600"), 90 + 90),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_stopped_rank_is_on_the_card_with_the_collective_that_waits_for_it(
    janus: Janus, tmp_path: Path, kind: str, timeouts: tuple[str, ...], limit_s: float
) -> None:
    world = [sys.executable, "-m", "janus_cluster.janusvln.world.demo", str(tmp_path / "episodes"), "--episodes", "4"]
    subprocess.run(world, check=True, capture_output=True, timeout=600)
    steps = ("training.max_steps=5000", "training.logging_steps=1", "checkpoint.every_steps=9000")
    values = (*steps, "checkpoint.export=false", "restart.on_failure=never", "data.roots=[episodes]", *timeouts)
    sets = [word for value in values for word in ("--set", value)]
    done = janus("submit", "demo", "--cluster", "local", "--nodes", "2", "--no-preflight", *sets)
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path)
    wait_until(lambda: run.metrics_jsonl.exists() and '"step": 2' in run.metrics_jsonl.read_text())
    os.kill(json.loads(run.heartbeat_json(1, 1).read_text())["pid"], signal.SIGSTOP)
    stopped_at = time.time()
    wait_until(lambda: json.loads(run.status_json.read_text())["state"] == "FAILED")
    assert time.time() - stopped_at < limit_s
    card = json.loads(janus("status", run.name, "--json").stdout)["card"]
    assert (card["kind"], card["rank"], card["node"]) == (kind, 1, "local-02"), card
    assert re.search(r"rank 1 on local-02 did not join \w+ #\d+ .*, in which rank 0 waits", card["message"]), card
    assert "missing ranks: {1}" in run.stall_analysis(1).read_text()


def wait_until(is_true: Callable[[], bool], *, limit_s: float = 300) -> None:
    deadline = time.monotonic() + limit_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.2)
