"""The ladder, tail and cancel on jobs of a real Slurm."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import pytest

from janus_cluster.desk.cancel import cancel_run
from janus_cluster.errors import JobNotFound, SlurmUnavailable, UsageError
from janus_cluster.node.slurm_launcher import SlurmLauncher
from janus_cluster.observe.logfile import GrowingFile
from janus_cluster.observe.tail import tail
from janus_cluster.run.files import write_json_atomically
from janus_cluster.run.paths import RunDir
from janus_cluster.sandbox import SandboxInfo
from janus_cluster.sandbox.daemons import is_alive
from janus_cluster.sandbox.hosts import SLURMCTLD, Starter
from janus_cluster.sandbox.layout import layout_of
from janus_cluster.sandbox.lifecycle import load_running
from janus_cluster.slurm.commands import Slurm
from janus_cluster.slurm.state import JobState, load_job_states

pytestmark = pytest.mark.slurm


class HasConf(Protocol):
    """What these tests need of the sandbox."""

    @property
    def slurm_conf(self) -> Path: ...


@pytest.fixture
def slurm(sandbox: HasConf) -> Slurm:
    return Slurm(conf=Path(sandbox.slurm_conf))


@pytest.fixture
def start(slurm: Slurm, tmp_path: Path) -> Iterator[Callable[..., RunDir]]:
    """start(body, *sbatch options) → a run folder whose job.sbatch was queued; cancelled when the test ends."""
    job_ids: list[str] = []

    def begin(body: str, *options: str) -> RunDir:
        run = RunDir(tmp_path / f"demo-{len(job_ids)}")
        run.logs.mkdir(parents=True)
        script = run.bundle(1).job_sbatch
        script.parent.mkdir(parents=True)
        script.write_text(f"#!/bin/bash\n#SBATCH --job-name=demo\n#SBATCH --output={run.batch_log}\n{body}\n")
        argv = ["sbatch", "--parsable", *options, str(script)]
        environ = os.environ | {"SLURM_CONF": str(slurm.conf)}
        job_id = subprocess.run(
            argv, env=environ, capture_output=True, text=True, check=True, timeout=600
        ).stdout.strip()
        job_ids.append(job_id)
        sent = {"cluster": "sandbox", "job_id": job_id, "submitted_at": time.time(), "slurm_conf": str(slurm.conf)}
        write_json_atomically(run.submission_json, sent)
        return run

    yield begin
    for job_id in job_ids:
        slurm.scancel(job_id)


def job_id_of(run: RunDir) -> str:
    return str(run.submission_json.read_text().split('"job_id": "')[1].split('"')[0])


def wait_for(run: RunDir, is_right: Callable[[JobState], bool], limit_s: float = 300) -> JobState:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        state = load_job_states([run])[0]
        if is_right(state):
            return state
        time.sleep(0.3)
    raise AssertionError(f"after {limit_s} s still {state}")


def write_status(run: RunDir, state: str, **changes: Any) -> None:
    times = {"started_at": time.time(), "updated_at": time.time()}
    value = {"cluster": "sandbox", "job_id": job_id_of(run), "attempt": 1, "nodes": ["h800-01"], "state": state}
    write_json_atomically(run.status_json, value | times | changes)


def test_failed_script_gives_its_exit_code(start: Callable[..., RunDir]) -> None:
    state = wait_for(start("exit 7"), lambda s: s.is_final)
    assert (state.state, state.exit_code, state.source) == ("FAILED", 7, "squeue")


def test_killed_script_gives_the_shells_exit_code(start: Callable[..., RunDir]) -> None:
    state = wait_for(start("kill -9 $$"), lambda s: s.is_final)
    assert (state.state, state.exit_code) == ("FAILED", 137)


def test_script_that_ends_well_is_completed(start: Callable[..., RunDir]) -> None:
    state = wait_for(start("true"), lambda s: s.state == "COMPLETED")
    assert state.command_exit_code == 0


def test_both_nodes_of_a_running_job_are_named(start: Callable[..., RunDir], slurm: Slurm) -> None:
    run = start("sleep 600", "--nodes=2")
    state = wait_for(run, lambda s: s.state == "RUNNING")
    assert len(state.nodes) == 2
    job = slurm.scontrol_show_job(job_id_of(run))
    assert job is not None
    assert (job.state, job.nodes, job.command) == ("RUNNING", state.nodes, str(run.bundle(1).job_sbatch))


def test_cancelled_job_is_not_believed_to_run_and_cannot_be_cancelled_twice(start: Callable[..., RunDir]) -> None:
    run = start("sleep 600")
    wait_for(run, lambda s: s.state == "RUNNING")
    write_status(run, "RUNNING")
    assert load_job_states([run])[0].source == "status.json"
    assert "was cancelled" in cancel_run(run)
    state = wait_for(run, lambda s: s.is_final)
    assert state.state == "CANCELLED"
    assert state.command_exit_code != 0
    with pytest.raises(UsageError, match="is not running: it is CANCELLED"):
        cancel_run(run)


def test_held_job_shows_why_and_tail_ends_when_it_is_cancelled(start: Callable[..., RunDir], slurm: Slurm) -> None:
    run = start("true", "--hold")
    assert wait_for(run, lambda s: s.state == "PENDING").reason == "JobHeldUser"
    cancelling = threading.Timer(1.5, slurm.scancel, [job_id_of(run)])
    cancelling.start()
    out = io.StringIO()
    code = tail(run, out=out, poll_s=0.1, state_poll_s=0.5)
    cancelling.join()
    assert code == 1
    assert out.getvalue().count("── PENDING: JobHeldUser ──") == 1
    assert "CANCELLED" in out.getvalue()


def test_requeued_job_is_waiting_again(start: Callable[..., RunDir], slurm: Slurm) -> None:
    run = start("sleep 600", "--requeue")
    wait_for(run, lambda s: s.state == "RUNNING")
    write_status(run, "STOPPED", exit_code=13)
    assert load_job_states([run])[0].state == "COMPLETING"
    slurm.requeue(job_id_of(run))
    state = wait_for(run, lambda s: s.state == "PENDING")
    assert state.attempt == 1
    assert not state.is_final


def test_many_jobs_are_answered_at_once(start: Callable[..., RunDir]) -> None:
    runs = [start("exit 3"), start("sleep 600"), start("true", "--hold")]
    wait_for(runs[0], lambda s: s.is_final)
    wait_for(runs[1], lambda s: s.state == "RUNNING")
    assert [s.state for s in load_job_states(runs)] == ["FAILED", "RUNNING", "PENDING"]


def test_jobs_that_slurm_never_had_are_unknown(slurm: Slurm, tmp_path: Path) -> None:
    assert slurm.squeue(["99999999"]) == {}
    assert slurm.squeue(["99999998", "99999999"]) == {}
    assert slurm.scontrol_show_job("99999999") is None
    assert slurm.sacct(["99999999"]) == {}
    with pytest.raises(JobNotFound):
        slurm.requeue("99999999")
    run = RunDir(tmp_path / "demo")
    run.path.mkdir()
    sent = {"cluster": "sandbox", "job_id": "99999999", "submitted_at": time.time(), "slurm_conf": str(slurm.conf)}
    write_json_atomically(run.submission_json, sent)
    assert load_job_states([run])[0].state == "UNKNOWN"
    with pytest.raises(JobNotFound):
        cancel_run(run)


def test_a_slurm_that_was_taken_down_is_unavailable_at_once(tmp_path: Path) -> None:
    with pytest.raises(SlurmUnavailable):
        Slurm(conf=tmp_path / "no-slurm.conf").squeue(["1"])


def test_slurms_own_line_of_a_cancelled_job_has_its_own_time(start: Callable[..., RunDir], slurm: Slurm) -> None:
    """The line holds its time, in local time; 22.05 to 24.11 begin it with a daemon's name, 25.05 with the time."""
    run = start("sleep 600")
    wait_for(run, lambda s: s.state == "RUNNING")
    slurm.scancel(job_id_of(run))
    cancelled_at = time.time()
    wait_for(run, lambda s: s.is_final)
    # Read much later than it was written, as after a night.
    later = cancelled_at + 3600
    os.utime(run.batch_log, (later, later))
    lines, _ = GrowingFile(run.batch_log).read_new()
    [line] = [line for line in lines if "CANCELLED AT" in line.text]
    assert line.time == pytest.approx(cancelled_at, abs=30)


def test_a_requeue_waits_for_a_controller_that_is_away(
    start: Callable[..., RunDir], slurm: Slurm, sandbox: SandboxInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start("sleep 600", "--requeue")
    state = wait_for(run, lambda s: s.state == "RUNNING")
    job_id = job_id_of(run)
    for name, value in sandbox.env().items():
        monkeypatch.setenv(name, value)
    launcher = SlurmLauncher("sandbox", job_id, tuple(state.nodes))
    starter = Starter(layout := layout_of(Path(sandbox.home)), load_running(layout))
    controller = starter.info.daemon(SLURMCTLD)
    assert controller is not None
    os.kill(controller.pid, signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        try:
            deadline = time.monotonic() + 60
            while is_alive(controller):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            asked = pool.submit(launcher.requeue)
            time.sleep(5)
            assert not asked.done(), "it is asked again, whatever the words of the refusal"
        finally:
            starter.start_slurmctld()
        assert asked.result(timeout=300) is None
    job = slurm.squeue([job_id])[job_id]
    assert job.restarts == 1 and job.state in ("COMPLETING", "PENDING")
