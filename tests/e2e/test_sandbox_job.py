"""The main job on a real two-node Slurm: submit → gate on both nodes → torchrun → ZeRO-3 → checkpoint → tail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from run_files import read_metric_lines

from janus_cluster.run.paths import RunDir
from janus_cluster.sandbox import SandboxInfo

pytestmark = pytest.mark.slurm

Janus = Callable[..., subprocess.CompletedProcess[str]]
ROOM = ("--set", "preflight.min_free_gb=0.1")
SHORT = ("--set", "training.max_steps=4", "--set", "training.logging_steps=1", "--set", "checkpoint.every_steps=2")
SMALL = (*SHORT, *ROOM)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few demo episodes, shared by the nodes as /tmp is."""
    folder = tmp_path_factory.mktemp("janus e2e")
    command = [sys.executable, "-m", "janus_cluster.janusvln.world.demo", str(folder / "demo_data"), "--episodes", "6"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def janus(sandbox: SandboxInfo, work: Path) -> Janus:
    """janus-cluster against the sandbox of this test session: JANUS_HOME is the folder that holds it."""

    def call(*argv: str, timeout_s: float = 400) -> subprocess.CompletedProcess[str]:
        environ = os.environ | {"JANUS_HOME": str(Path(sandbox.home).parent), "DEMO_DATA": str(work / "demo_data")}
        return subprocess.run(
            [sys.executable, "-m", "janus_cluster.cli", *argv],
            cwd=work,
            env=environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )

    return call


def submit(janus: Janus, *argv: str) -> tuple[str, RunDir]:
    done = janus("submit", *argv, "--cluster", "sandbox", "--json")
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    return value["job_id"], RunDir(Path(value["run_dir"]))


def status(janus: Janus, job_id: str) -> dict[str, Any]:
    done = janus("status", job_id, "--json")
    assert done.returncode == 0, done.stderr
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def everything(run: RunDir) -> str:
    """All logs of a run, for an assertion's message."""
    logs = [run.batch_log, *sorted(run.logs.glob("attempt_*/*.log"))]
    return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-3000:]}" for p in logs if p.exists())


def slurm(sandbox: SandboxInfo, argv: Sequence[str], *, timeout_s: float = 30) -> str:
    environ = os.environ | sandbox.env()
    return subprocess.run(argv, env=environ, capture_output=True, text=True, check=True, timeout=timeout_s).stdout


@pytest.fixture(scope="module")
def trained(janus: Janus) -> tuple[str, RunDir, subprocess.CompletedProcess[str]]:
    """jobs/demo.yaml on both nodes, followed to its end."""
    job_id, run = submit(janus, "demo", "--nodes", "2", *SMALL)
    tailed = janus("tail", job_id)
    return job_id, run, tailed


Trained = tuple[str, RunDir, subprocess.CompletedProcess[str]]


def test_the_job_allocates_both_nodes_with_eight_gpus_each(trained: Trained, sandbox: SandboxInfo) -> None:
    job_id, run, _ = trained
    shown = slurm(sandbox, ["scontrol", "show", "job", job_id])
    assert "NodeList=h800-[01-02]" in shown
    assert "gres/gpu=16" in shown or "gres:gpu:h800:8" in shown
    assert "--gres=gpu:h800:8" in run.bundle(1).job_sbatch.read_text()


def test_tail_merges_both_nodes_and_returns_0(trained: Trained) -> None:
    _, run, tailed = trained
    assert tailed.returncode == 0, everything(run)
    for node in ("h800-01", "h800-02"):
        assert node in tailed.stdout
    assert "step 4/4" in tailed.stdout


def test_both_nodes_have_a_verdict_and_it_is_a_pass(trained: Trained) -> None:
    job_id, run, _ = trained
    for node in ("h800-01", "h800-02"):
        verdict = json.loads(run.node_verdict_json(1, node).read_text())
        assert (verdict["state"], verdict["job_id"], verdict["nodes"]) == ("PASS", job_id, [node])
        measured = {r["id"]: r for r in verdict["results"]}
        assert measured["all_reduce"]["state"] == "PASS"
        assert measured["paths.data"]["state"] == "PASS"


def test_zero_3_trained_on_two_nodes(trained: Trained) -> None:
    _, run, _ = trained
    assert json.loads(run.bundle(1).ds_config_json.read_text())["zero_optimization"]["stage"] == 3
    steps = [r for r in read_metric_lines(run) if r["kind"] == "train"]
    assert [r["step"] for r in steps] == [1, 2, 3, 4]
    assert {p.name for p in run.attempt_logs(1).glob("*.rank*.log")} == {"h800-01.rank0.log", "h800-02.rank1.log"}


def test_a_checkpoint_and_an_exported_model_are_there(trained: Trained, tmp_path: Path) -> None:
    _, run, _ = trained
    assert (run.checkpoints / "checkpoint-4").is_dir()
    program = (
        "import sys; from janus_cluster.janusvln.model.janus import JanusModel;"
        "from transformers import AutoTokenizer;"
        "m = JanusModel.from_pretrained(sys.argv[1]); t = AutoTokenizer.from_pretrained(sys.argv[1]);"
        "print(sum(p.numel() for p in m.parameters()), len(t))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(run.export)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-2]) > 0


def test_the_state_is_completed(trained: Trained, janus: Janus) -> None:
    job_id, run, _ = trained
    value = status(janus, job_id)
    assert (value["state"], value["exit_code"], value["attempt"]) == ("COMPLETED", 0, 1)
    assert (value["step"], value["total_steps"], value["nodes"]) == (4, 4, ["h800-01", "h800-02"])
    assert value["name"] == run.name


def test_the_state_in_slurm_is_completed(trained: Trained, sandbox: SandboxInfo) -> None:
    deadline = time.monotonic() + 60
    while "JobState=COMPLETED" not in (shown := slurm(sandbox, ["scontrol", "show", "job", trained[0]])):
        assert time.monotonic() < deadline, shown
        time.sleep(0.5)


def test_sbatch_by_hand_does_the_same(janus: Janus, sandbox: SandboxInfo) -> None:
    done = janus("submit", "demo", "--nodes", "2", "--dry-run", "--json", "--set", "kind=preflight")
    run = RunDir(Path(json.loads(done.stdout)["run_dir"]))
    slurm(sandbox, ["sbatch", "--wait", str(run.links.job_sbatch)], timeout_s=300)
    assert json.loads(run.verdict_json(1).read_text())["state"] == "PASS", everything(run)
    assert json.loads(run.status_json.read_text())["state"] == "COMPLETED"


def test_a_path_missing_on_one_node_fails_the_gate_and_training_never_starts(
    janus: Janus, sandbox: SandboxInfo
) -> None:
    if sandbox.mode == "namespaces":
        for node, name in (("h800-01", "here"), ("h800-02", "elsewhere")):
            folder = Path(sandbox.node(node).mnt) / name  # type: ignore[union-attr]
            folder.mkdir(exist_ok=True)
            (folder / "file").touch()
        path, bad = "/mnt/node/here", ["h800-02"]
    else:
        path, bad = "/no/such/place", ["h800-01", "h800-02"]
    job_id, run = submit(janus, "demo", "--nodes", "2", *SMALL, "--set", f"preflight.require_paths=[{path}]")
    tailed = janus("tail", job_id)
    assert tailed.returncode == 10, everything(run)
    value = status(janus, job_id)
    assert (value["state"], value["exit_code"]) == ("FAILED", 10)
    assert all(node in value["reason"] for node in bad)
    assert "paths.required" in value["reason"]
    verdict = json.loads(run.verdict_json(1).read_text())
    assert verdict["exclude"] == bad
    assert "paths.required" in janus("status", job_id).stdout
    assert list(run.attempt_logs(1).glob("*.rank*.log")) == []
    assert list(read_metric_lines(run)) == []
    shown = slurm(sandbox, ["scontrol", "show", "job", job_id])
    assert "JobState=FAILED" in shown or "JobState=COMPLETING" in shown
    assert "ExitCode=10:0" in shown


def test_preflight_alone_prints_the_verdict(janus: Janus) -> None:
    done = janus("preflight", "demo", "--nodes", "2", "--cluster", "sandbox", "--json", *ROOM)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verdict"] == "PASS"


def test_a_refusal_of_the_real_sbatch_leaves_nothing(janus: Janus, sandbox: SandboxInfo) -> None:
    done = janus("submit", "demo", "--cluster", "sandbox", "--name", "refused", "--set", "slurm.partition=gold")
    assert done.returncode == 2
    assert "invalid partition" in done.stderr
    assert not list((Path(sandbox.home).parent / "runs").glob("refused-*"))


def test_a_cancelled_job_is_reported_as_such(janus: Janus) -> None:
    job_id, run = submit(janus, "demo", "--nodes", "2", "--set", "training.max_steps=5000", *ROOM)
    deadline = time.monotonic() + 120
    while not list(read_metric_lines(run)):
        assert time.monotonic() < deadline, everything(run)
        time.sleep(0.5)
    assert janus("cancel", job_id).returncode == 0
    tailed = janus("tail", job_id)
    assert tailed.returncode not in (0, 12), everything(run)
    assert status(janus, job_id)["state"] == "CANCELLED"


def test_the_gate_runs_on_a_sandbox_without_namespaces(work: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two slurmd on one host: node names do not resolve, and rank 0 is reached by the address that Slurm knows."""
    home = tmp_path_factory.mktemp("p")
    environ = os.environ | {"JANUS_HOME": str(home), "DEMO_DATA": str(work / "demo_data")}

    def call(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "janus_cluster.cli", *argv]
        return subprocess.run(command, cwd=work, env=environ, capture_output=True, text=True, check=False, timeout=600)

    try:
        up = call("sandbox", "up", "--mode", "plain")
        assert up.returncode == 0, up.stderr
        done = call("preflight", "demo", "--cluster", "sandbox", "--json", *ROOM)
        assert done.returncode == 0, done.stderr
        assert sorted(json.loads(done.stdout)["nodes"]) == ["h800-01", "h800-02"]
    finally:
        assert call("sandbox", "down").returncode == 0
