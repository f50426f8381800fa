"""A step that srun cannot start: a class of its own, in srun's words, that blames no node. srun is a script on PATH."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from janus_cluster.diagnosis.card import next_steps
from janus_cluster.job.load import load_job
from janus_cluster.job.resolve import resolve_job
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.job.resources import jobs_dir
from janus_cluster.node.attempt import run_attempt
from janus_cluster.node.phases import Attempt, StopSignals
from janus_cluster.node.slurm_launcher import SlurmLauncher
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.attempt import AttemptRecord
from janus_cluster.run.records.bundle import ResolvedRecord

NO_MEMORY = "srun: error: Unable to create step for job 4711: Memory required by task is not available"
NO_MPI = "srun: error: Invalid MPI type 'pmix', --mpi=list for acceptable types"
BUSY = "srun: Job 4711 step creation temporarily disabled, retrying (Requested nodes are busy)"
EXCLUDES = "preflight.on_fail=exclude-and-retry"


def resolve(folder: Path, *sets: str) -> ResolvedJob:
    loaded = load_job(jobs_dir() / "demo.yaml", sets=sets, environ={})
    return resolve_job(loaded, run_dir=folder, cluster="slurm", environ={}, cwd=folder, python=sys.executable)


def attempt_with(srun: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *sets: str) -> tuple[int | None, RunDir]:
    """One attempt on two nodes with this srun. Returns: its exit code."""
    (folder / "bin").mkdir()
    for name, text in (("srun", srun), ("scontrol", f"echo $* >> {folder}/scontrol.log")):
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")
    run = RunDir(folder / "run")
    run.path.mkdir()
    launcher = SlurmLauncher("slurm", "4711", ("localhost", "127.0.0.2"))
    code = run_attempt(Attempt(run, resolve(run.path, *sets), launcher, StopSignals()))
    assert not (folder / "scontrol.log").exists(), "nothing was queued again"
    return code, run


@pytest.mark.parametrize("sets", [(), ("preflight.enabled=false",), (EXCLUDES,), ("kind=index",)])
@pytest.mark.parametrize("message", [NO_MEMORY, NO_MPI])
def test_a_step_that_srun_cannot_create_blames_no_node(
    message: str,
    sets: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    code, run = attempt_with(f'echo "{message}" >&2; exit 1', tmp_path, monkeypatch, *sets)
    assert code == 11
    record = AttemptRecord.load(run.attempt_json(1))
    assert record is not None and record.failure is not None
    assert record.failure.kind == "launch" and message in (record.failure.message or "")
    assert record.failure.node is None and not record.failure.blames_node
    assert not run.verdict_json(1).exists() and not run.retry_json.exists()
    assert message in capfd.readouterr().err, "it is in batch.log, too"
    steps = next_steps(record.failure, run=run, checkpoint=None, resolved=ResolvedRecord())
    assert "batch.log" in steps[0]


@pytest.mark.slow
def test_a_step_that_waits_for_the_nodes_until_the_time_limit_is_none_of_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, run = attempt_with(f'echo "{BUSY}" >&2; exec sleep 60', tmp_path, monkeypatch, "preflight.timeout_s=10")
    record = AttemptRecord.load(run.attempt_json(1))
    assert code == 11 and record is not None and BUSY in str(record.reason)


def test_a_task_that_began_and_ended_badly_is_judged_by_the_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begins = f"mkdir -p {tmp_path}/run/logs/attempt_1; echo begun > {tmp_path}/run/logs/attempt_1/localhost.log"
    code, run = attempt_with(f'{begins}; echo "{NO_MEMORY}" >&2; exit 1', tmp_path, monkeypatch)
    assert code == 10 and run.verdict_json(1).exists()


def test_a_site_with_an_mpi_of_its_own_needs_none_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuses = (
        f'[[ " $* " == *" --mpi=none "* ]] || {{ echo "{NO_MPI}" >&2; exit 1; }}; echo $* > {tmp_path}/argv; exit 1'
    )
    attempt_with(refuses, tmp_path, monkeypatch)
    assert "--mpi=none" in (tmp_path / "argv").read_text()
