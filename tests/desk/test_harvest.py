"""Whose fault it was: a node is remembered only for what the node did."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from run_files import write_verdict

from janus_cluster.desk.harvest import blamed_nodes
from janus_cluster.diagnosis.card import FailureCard
from janus_cluster.observe.status import RunStatus
from janus_cluster.run.files import write_json_atomically
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.attempt import AttemptRecord
from janus_cluster.run.records.failure import FailureRecord
from janus_cluster.run.records.health import GpuSample, HealthSample
from janus_cluster.slurm.state import JobState


def status_of(
    folder: Path, failure: FailureRecord, *, cluster: str = "slurm", results: list[Any] | None = None
) -> RunStatus:
    run = RunDir(folder / "demo-1")
    run.path.mkdir()
    run.begin_attempt()
    write_json_atomically(run.submission_json, {"cluster": cluster, "job_id": "7", "submitted_at": time.time()})
    nodes = sorted({node for node, _, _ in results or []})
    write_verdict(run, 1, [(*row, "bad") for row in results or []])
    state = JobState(state="FAILED", source="status.json", exit_code=10, attempt=1, nodes=tuple(nodes))
    card = FailureCard(failure=failure, checkpoint=None, ended_at=1.0, next_steps=())
    return RunStatus(run=run, job_id="7", state=state, card=card)


@pytest.mark.parametrize(
    ("results", "blamed"),
    [
        ([("a", "gpu.count", "PASS"), ("b", "gpu.count", "FAIL")], ["b"]),
        ([("a", "paths.data", "PASS"), ("b", "paths.data", "FAIL")], ["b"]),
        # The same everywhere: the job asks for what no node has.
        ([("a", "paths.data", "FAIL"), ("b", "paths.data", "FAIL")], []),
        ([("a", "gpu.model", "FAIL"), ("b", "gpu.model", "FAIL")], []),
        ([("a", "paths.data", "FAIL"), ("b", "gpu.xid", "FAIL")], ["b"]),
        # One node alone: only its hardware is surely its own.
        ([("a", "paths.data", "FAIL")], []),
        ([("a", "gpu.nvlink", "FAIL")], ["a"]),
        ([("a", "paths.data", "FAIL"), ("b", "net.links", "FAIL"), ("b", "paths.data", "FAIL")], ["b"]),
        ([("a", "rail.mlx5_0", "WARN"), ("b", "rail.mlx5_0", "ERROR")], []),
    ],
)
def test_the_gate_blames_a_node_only_for_what_is_its_own(tmp_path: Path, results: list[Any], blamed: list[str]) -> None:
    found = blamed_nodes(status_of(tmp_path, FailureRecord(kind="preflight"), results=results))
    assert [r.node for r in found] == blamed
    assert all((r.kind, r.run, r.attempt, r.time) == ("preflight", "demo-1", 1, 1.0) for r in found)


@pytest.mark.parametrize(
    ("kind", "blamed"),
    [("xid", ["b"]), ("node_lost", ["b"]), ("exception", []), ("signal", []), ("nccl_timeout", []), ("disk_full", [])],
)
def test_a_crash_blames_a_node_only_where_the_node_broke(tmp_path: Path, kind: Any, blamed: list[str]) -> None:
    status = status_of(tmp_path, FailureRecord(kind=kind, node="b", message="words"))
    assert [r.node for r in blamed_nodes(status)] == blamed


def test_a_machine_without_slurm_has_no_nodes_to_remember(tmp_path: Path) -> None:
    assert blamed_nodes(status_of(tmp_path, FailureRecord(kind="xid", node="b"), cluster="local")) == []


def test_a_node_that_the_gate_refused_before_a_retry_that_went_well_is_remembered(tmp_path: Path) -> None:
    status = status_of(
        tmp_path, FailureRecord(kind="preflight"), results=[("a", "gpu.count", "PASS"), ("b", "gpu.xid", "FAIL")]
    )
    status.run.begin_attempt()
    went_well = RunStatus(run=status.run, job_id="7", state=JobState(state="COMPLETED", source="x", attempt=2))
    assert [(r.node, r.attempt) for r in blamed_nodes(went_well)] == [("b", 1)]


# Captured: slurmd of h800-02 was killed during attempt 1, and Slurm 22.05 queued the job again.
NODE_FAILURE = """\
attempt 1 of demo-1: job 2 on h800-01, h800-02
srun: error: Node failure on h800-02
slurmstepd-h800-01: error: *** JOB 2 ON h800-01 CANCELLED AT 2026-11-21T05:55:36 DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***
srun: Job step aborted: Waiting up to 7 seconds for job step to finish.
slurmstepd-h800-01: error: *** STEP 2.0 ON h800-01 CANCELLED AT 2026-11-21T05:55:36 DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***
srun: error: h800-01: task 0: Terminated
attempt 2 of demo-1: job 2 on h800-01, h800-03
"""  # noqa: E501


def test_a_node_that_broke_under_an_earlier_attempt_is_remembered_from_its_record(tmp_path: Path) -> None:
    status = status_of(tmp_path, FailureRecord(kind="unknown"))
    failure = FailureRecord(kind="xid", rank=9, node="h800-02", message="Xid 79: GPU has fallen off the bus")
    record = AttemptRecord(attempt=1, from_step=0, started_at=1.0, ended_at=2.0, state="FAILED", failure=failure)
    record.write(status.run.attempt_json(1))
    (found,) = blamed_nodes(status)
    assert (found.node, found.attempt, found.kind, found.time) == ("h800-02", 1, "xid", 2.0)


def test_a_lost_node_is_remembered_though_the_job_was_queued_again(tmp_path: Path) -> None:
    status = status_of(tmp_path, FailureRecord(kind="unknown"))
    status.run.batch_log.write_text(NODE_FAILURE)
    waiting = RunStatus(run=status.run, job_id="7", state=JobState(state="PENDING", source="squeue"))
    (found,) = blamed_nodes(waiting)
    assert (found.node, found.attempt, found.kind) == ("h800-02", 1, "node_lost")
    assert found.time == datetime(2026, 11, 21, 5, 55, 36).astimezone().timestamp()


def test_a_node_whose_gpu_the_hardware_slowed_down_is_remembered_though_the_run_completed(tmp_path: Path) -> None:
    status = status_of(tmp_path, FailureRecord(kind="unknown"))
    for node, bits in (("h800-01", 0x4), ("h800-02", 0x40)):
        status.run.health_jsonl(1, node).parent.mkdir(exist_ok=True)
        for i in range(20):
            gpu = GpuSample(gpu=5, sm_mhz=900.0, reasons=bits)
            HealthSample(time=100.0 + 30 * i, gpus=(gpu,)).append(status.run.health_jsonl(1, node))
    went_well = RunStatus(run=status.run, job_id="7", state=JobState(state="COMPLETED", source="x", attempt=1))
    (found,) = blamed_nodes(went_well)
    assert (found.node, found.attempt, found.kind, found.time) == ("h800-02", 1, "gpu_throttle", 670.0)
    assert found.reason == "GPU 5: HW thermal slowdown in 20 of 20 samples while it trained"
