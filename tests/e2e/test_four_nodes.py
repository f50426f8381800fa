"""Four true hosts: the gate blames one node alone, one job file runs on two nodes and on four, a lost node is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from run_files import read_metric_lines

from janus_cluster.errors import SandboxFailed, UsageError
from janus_cluster.run.files import read_json
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.bundle import load_resolved
from janus_cluster.run.records.submission import StatusRecord
from janus_cluster.sandbox import SandboxInfo, down, fault, heal, up
from janus_cluster.sandbox.programs import namespaces_problem
from tests.conftest import not_tested, require_slurm

pytestmark = pytest.mark.slurm

Janus = Callable[..., subprocess.CompletedProcess[str]]
NODES = tuple(f"h800-{k:02d}" for k in range(1, 5))
ROOM = ("--set", "preflight.min_free_gb=0.1", "--set", "preflight.use_node_memory=false")
LOGGED = ("--set", "training.logging_steps=1", "--set", "checkpoint.every_steps=4", "--set", "checkpoint.export=false")


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxInfo]:
    """A sandbox of four hosts beside the session's own."""
    require_slurm()
    if namespaces_problem() is not None:
        not_tested("NO NAMESPACES HERE, so four hosts were not tested: they need root")
    home = tmp_path_factory.mktemp("f") / "sandbox"
    try:
        yield up(home, nodes=4, mode="namespaces")
    finally:
        down(home)


@pytest.fixture
def healthy(four: SandboxInfo) -> Iterator[Path]:
    """The sandbox's folder; faults of the test are undone after it."""
    yield Path(four.home)
    heal(Path(four.home), wait_s=200)


@pytest.fixture(scope="module")
def janus(four: SandboxInfo) -> Janus:
    """janus-cluster against the four hosts, with a few demo episodes."""
    work = Path(four.home).parent
    command = [sys.executable, "-m", "janus_cluster.janusvln.world.demo", str(work / "demo_data"), "--episodes", "6"]
    subprocess.run(command, check=True, capture_output=True)
    environ = os.environ | {"JANUS_HOME": str(work), "DEMO_DATA": str(work / "demo_data")}

    def call(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "janus_cluster.cli", *argv],
            cwd=work,
            env=environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )

    return call


def gate(janus: Janus) -> dict[str, Any]:
    done = janus("preflight", "demo", "--nodes", "4", "--cluster", "sandbox", "--json", *ROOM)
    assert done.stdout, done.stderr
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def failed(report: dict[str, Any]) -> list[tuple[str, str]]:
    results = [*report["cross_node"], *(r for of_node in report["nodes"].values() for r in of_node)]
    return [(r["id"], r["node"]) for r in results if r["state"] == "FAIL"]


def submit(janus: Janus, *argv: str) -> tuple[str, RunDir]:
    done = janus("submit", "demo", "--cluster", "sandbox", "--json", *ROOM, *LOGGED, *argv)
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    return value["job_id"], RunDir(Path(value["run_dir"]))


def status(run: RunDir) -> StatusRecord:
    return StatusRecord.require(run.status_json)


def steps(run: RunDir, attempt: int) -> list[int]:
    return [r["step"] for r in read_metric_lines(run) if r["kind"] == "train" and r["attempt"] == attempt]


def slurm(info: SandboxInfo, *argv: str, check: bool = True) -> str:
    environ = os.environ | info.env()
    return subprocess.run(argv, env=environ, capture_output=True, text=True, check=check, timeout=120).stdout


def wait_for(happened: Callable[[], bool], run: RunDir, *, limit_s: float = 600) -> None:
    deadline = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < deadline, run.batch_log.read_text()[-3000:]
        time.sleep(1)


def test_a_half_rate_rail_is_of_one_node_alone(janus: Janus, healthy: Path) -> None:
    # All rails are held to one rate first: without it the processors, not the wire, would be the limit here.
    for node in NODES:
        fault(healthy, "slow-link", node, rate="400mbit")
    fault(healthy, "slow-link", "h800-02", rail="ib3", rate="200mbit")
    report = gate(janus)
    assert failed(report) == [("rail.ib3", "h800-02")]
    assert (report["verdict"], report["exclude"]) == ("FAIL", ["h800-02"])
    (row,) = (r for r in report["nodes"]["h800-02"] if r["id"] == "rail.ib3")
    assert "with whom others are fast" in row["fix"]


def test_a_cut_rail_is_of_one_node_alone(janus: Janus, healthy: Path) -> None:
    fault(healthy, "cut-link", "h800-03", rail="ib5")
    report = gate(janus)
    assert failed(report) == [("net.links", "h800-03")]
    assert (report["verdict"], report["exclude"]) == ("FAIL", ["h800-03"])


def test_one_job_file_trains_on_two_nodes_and_on_four(janus: Janus) -> None:
    batch = ("--set", "training.effective_batch_size=null", "--set", "training.max_steps=3")
    for number in (2, 4):
        job_id, run = submit(janus, "--nodes", str(number), *batch)
        done = janus("tail", job_id)
        assert done.returncode == 0, done.stdout[-3000:]
        assert (status(run).state, status(run).nodes) == ("COMPLETED", NODES[:number])
        assert steps(run, 1) == [1, 2, 3]
        assert load_resolved(run.bundle(1)).world_size == number
        assert read_json(run.verdict_json(1))["state"] in ("PASS", "WARN")


def test_a_run_that_lost_a_node_goes_on_without_it_where_nodes_min_allows_it(
    janus: Janus, healthy: Path, four: SandboxInfo
) -> None:
    # A batch of 12 is 4 ranks × 3 and 3 ranks × 4.
    batch = ("--set", "training.per_device_batch_size=1", "--set", "training.gradient_accumulation_steps=3")
    sets = (*batch, "--set", "nodes_min=3", "--set", "training.max_steps=5000")
    job_id, run = submit(janus, "--nodes", "4", "--no-preflight", *sets)
    wait_for(lambda: 5 in steps(run, 1), run)
    assert status(run).nodes == NODES
    fault(healthy, "cut-link", "h800-03")

    def goes_on() -> bool:
        # Slurm lets a requeued job wait for two minutes; this test does not.
        if "JobState=PENDING" in slurm(four, "scontrol", "show", "job", job_id):
            slurm(four, "scontrol", "update", f"JobId={job_id}", "StartTime=now", check=False)
        return len(steps(run, 2)) >= 2

    wait_for(goes_on, run)
    left = tuple(node for node in NODES if node != "h800-03")
    assert (status(run).attempt, status(run).nodes) == (2, left)
    first = steps(run, 2)[0]
    assert first > 1 and (first - 1 in steps(run, 1)), "on from a checkpoint, not from the beginning"
    small = load_resolved(run.bundle(load_resolved(run.bundle(1)).fewer_nodes[3]))
    assert (small.world_size, small.effective_batch_size) == (3, 12)
    assert "3 of 4 nodes (nodes_min)" in run.batch_log.read_text()
    shown = json.loads(janus("status", job_id, "--json").stdout)
    assert (shown["state"], shown["nodes"]) == ("RUNNING", list(left))
    slurm(four, "scancel", job_id)
    wait_for(lambda: status(run).state == "CANCELLED", run)


def test_another_number_of_nodes_is_another_sandbox(four: SandboxInfo) -> None:
    with pytest.raises(SandboxFailed, match="a sandbox with 4 nodes runs"):
        up(Path(four.home), nodes=2)
    assert up(Path(four.home)).node_names == NODES
    with pytest.raises(UsageError, match="1 to 8 nodes"):
        up(Path(four.home), nodes=9)
    with pytest.raises(UsageError, match="node 'h800-05': there is h800-01, h800-02, h800-03, h800-04"):
        fault(Path(four.home), "stop-slurmd", "h800-05")
