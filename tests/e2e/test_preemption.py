"""A job that a partition of higher priority preempts, on a real Slurm with a grace time (partition_prio, REQUEUE).

Slurm 24.05 to 25.05 requeues such a job once more when a later attempt has ended with 0.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from demo_runs import EVERY, Runs, wait_until

from janus_cluster.run.files import read_json
from janus_cluster.sandbox import SandboxInfo, down, up
from janus_cluster.sandbox.daemons import is_alive
from janus_cluster.sandbox.hosts import SLURMCTLD, Starter
from janus_cluster.sandbox.layout import layout_of
from janus_cluster.sandbox.lifecycle import load_running, node_states
from tests.conftest import require_slurm

pytestmark = pytest.mark.slurm

STEPS = 15 * EVERY


def allow_preemption(home: Path) -> None:
    """Partition `urgent` takes the nodes of a running job after a grace time of 60 s."""
    layout = layout_of(home)
    starter = Starter(layout, load_running(layout))
    controller = starter.info.daemon(SLURMCTLD)
    assert controller is not None
    text = layout.slurm_conf.read_text()
    own = re.search(r"^PartitionName=\S+.*$", text, re.MULTILINE)
    assert own is not None
    urgent = re.sub(r"PartitionName=\S+", "PartitionName=urgent", own[0]).replace("Default=YES", "Default=NO")
    text = text.replace(own[0], f"{own[0]} PriorityTier=1 PreemptMode=REQUEUE GraceTime=60\n{urgent} PriorityTier=9")
    layout.slurm_conf.write_text(f"{text}\nPreemptType=preempt/partition_prio\nPreemptMode=REQUEUE\n")
    os.kill(controller.pid, signal.SIGTERM)
    wait_until(lambda: not is_alive(controller))
    starter.start_slurmctld()
    wait_until(lambda: set(node_states(load_running(layout)).values()) == {"idle"})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    require_slurm()
    home = tmp_path_factory.mktemp("q") / "sandbox"
    info: SandboxInfo = up(home)
    try:
        allow_preemption(home)
        folder = tmp_path_factory.mktemp("preempted")
        command = [sys.executable, "-m", "janus_cluster.janusvln.world.demo", str(folder / "data"), "--episodes", "6"]
        subprocess.run(command, check=True, capture_output=True)
        yield Runs(folder, info, data=folder / "data")
    finally:
        down(home)


def test_a_preempted_run_completes_with_two_attempts_that_train_and_stays_completed(runs: Runs) -> None:
    job = runs.submit("preflight.min_free_gb=0.05", steps=STEPS, with_gate=True)
    job.wait_for_step(EVERY + 1)
    urgent = runs.slurm(
        "sbatch",
        "--parsable",
        "--partition=urgent",
        "--nodes=2",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=sleep 20",
    )
    job.wait_until(lambda: bool(job.events("stop")))
    # No StartTime=now here: the urgent job is to have the nodes first.
    job.wait_until(lambda: "RUNNING" in state_of(runs, urgent))
    assert job.status()["state"] in ("PENDING", "PREEMPTED", "STOPPED")
    job.wait_until(lambda: state_of(runs, urgent) == "")
    job.wait_until(lambda: bool(job.events("complete")) or job.is_running_again())
    job.wait_for_event("complete")
    # Whatever Slurm begins afterwards.
    job.wait_until(lambda: job.is_in_state(""), limit_s=400)
    status = job.status()
    assert (status["state"], status["exit_code"]) == ("COMPLETED", 0)
    assert {event["attempt"] for event in job.events("train")} == {1, 2}
    [(attempt, step)] = job.resumed_at()
    assert (attempt, step) == (2, max(job.curve(attempt=1))), "saved at the step where it was stopped"
    assert sorted(job.curve()) == list(range(1, STEPS + 1))
    later = [a for a in job.run.attempts() if a > 2]
    assert all(read_json(job.run.attempt_json(a))["exit_code"] == 0 for a in later)
    assert not any(job.run.verdict_json(a).exists() for a in later), "the gate does not run for a run that is done"


def state_of(runs: Runs, job_id: str) -> str:
    return runs.slurm("squeue", "--noheader", f"--jobs={job_id.strip()}", "--format=%T", check=False).strip()
