"""Faults of a night on a real two-node Slurm: what others do to a job and its nodes, and what its user types."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from demo_runs import EVERY, Curve, Job, Runs, requires_nothing_lost, wait_until

from janus_cluster.run.files import read_json
from janus_cluster.run.paths import RunDir
from janus_cluster.sandbox import SandboxInfo
from janus_cluster.sandbox.daemons import is_alive
from janus_cluster.sandbox.hosts import SLURMCTLD, Starter, slurmd_name
from janus_cluster.sandbox.layout import layout_of
from janus_cluster.sandbox.lifecycle import load_running
from tests.conftest import not_tested

pytestmark = pytest.mark.slurm

STEPS = 6 * EVERY
FAULTY = "h800-02"


@pytest.fixture(scope="module")
def runs(sandbox: SandboxInfo, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("night")
    command = [sys.executable, "-m", "janus_cluster.janusvln.world.demo", str(folder / "data"), "--episodes", "6"]
    subprocess.run(command, check=True, capture_output=True)
    (folder / "elsewhere").mkdir()
    return Runs(folder, sandbox, data=folder / "data")


@pytest.fixture(autouse=True)
def nothing_is_left(runs: Runs) -> Iterator[None]:
    """Each test begins with an idle Slurm."""
    yield
    runs.end_all()


@pytest.fixture(scope="module")
def reference(runs: Runs) -> Curve:
    """The losses of a run that nothing happens to."""
    job = runs.submit("checkpoint.every_steps=1000", steps=STEPS)
    job.wait_for_end()
    return job.curve()


def type_line(runs: Runs, line: str) -> subprocess.CompletedProcess[str]:
    """What a shell in another folder makes of this line."""
    program = f'janus-cluster() {{ "{sys.executable}" -m janus_cluster.cli "$@"; }}'
    return subprocess.run(
        ["bash", "-c", f"{program}\n{line}"],
        cwd=runs.folder / "elsewhere",
        env=os.environ | runs.sandbox.env() | {"JANUS_HOME": str(runs.folder), "DEMO_DATA": str(runs.data)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def newest_checkpoint(job: Job) -> Path:
    return max(job.run.checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def test_what_others_do_to_a_running_job_changes_no_step_of_it(runs: Runs, reference: Curve) -> None:
    """Another time limit, a node that is drained, a suspension longer than hang_timeout_s, a checkpoint removed."""
    job = runs.submit("training.hang_timeout_s=12", steps=STEPS)
    job.wait_for_step(EVERY + 1)
    runs.slurm("scontrol", "update", f"JobId={job.id}", "TimeLimit=03:00:00")
    runs.slurm("scontrol", "update", f"NodeName={FAULTY}", "State=DRAIN", "Reason=fan")
    try:
        runs.slurm("scontrol", "suspend", job.id)
        status = job.status()
        assert (status["state"], status["exit_code"]) == ("SUSPENDED", None)
        resume, _ = status["next"]
        time.sleep(20)
        assert type_line(runs, resume).returncode == 0
        step = max(job.curve())
        job.wait_for_step(step + 1)
        shutil.rmtree(newest_checkpoint(job))
        status = job.wait_for_end()
    finally:
        runs.slurm("scontrol", "update", f"NodeName={FAULTY}", "State=RESUME")
    assert (status["state"], status["exit_code"], status["attempt"]) == ("COMPLETED", 0, 1)
    logs = [job.run.rank_log(1, node, rank).read_text() for rank, node in enumerate(("h800-01", FAULTY))]
    assert not any("no progress" in log for log in logs), "no rank has taken the suspension for a standstill"
    job.requires(reference, steps=STEPS)


def test_a_job_that_was_requeued_and_held_from_outside_shows_what_releases_it(runs: Runs) -> None:
    job = runs.submit(steps=STEPS)
    job.wait_for_step(EVERY + 1)
    held_at = time.monotonic()
    runs.slurm("scontrol", "requeuehold", job.id)
    job.wait_until(lambda: job.status()["state"] == "PENDING", pause_s=1.0)
    assert time.monotonic() - held_at < 60
    status = job.status()
    assert (status["exit_code"], status["reason"]) == (None, "job requeued in held state")
    (release,) = status["next"]
    assert release.startswith(f"scontrol release {job.id} ") and type_line(runs, release).returncode == 0
    status = job.wait_for_end(attempt=2)
    assert (status["state"], status["exit_code"]) == ("COMPLETED", 0)
    [(attempt, step)] = job.resumed_at()
    assert attempt == 2 and step >= EVERY
    requires_nothing_lost(job.run, resumed_at=step, steps=STEPS)


def test_of_two_resumes_at_once_one_queues_the_run_and_none_while_the_old_job_is_completing(runs: Runs) -> None:
    job = runs.submit(steps=2000)
    job.wait_for_step(EVERY + 1)
    slurmd = load_running(layout_of(Path(runs.sandbox.home))).daemon(slurmd_name(FAULTY))
    assert slurmd is not None
    # A node that does not answer for a while: so the job stays in COMPLETING.
    os.kill(slurmd.pid, signal.SIGSTOP)
    try:
        runs.slurm("scancel", job.id)
        job.wait_until(lambda: job.is_in_state("COMPLETING"))
        assert job.status()["state"] == "COMPLETING"
        refused = type_line(runs, f"janus-cluster resume {job.run.name}")
    finally:
        os.kill(slurmd.pid, signal.SIGCONT)
    assert refused.returncode == 2 and "is COMPLETING" in refused.stderr
    job.wait_until(lambda: job.is_in_state(""))
    status = job.status()
    assert (status["state"], status["exit_code"], status["card"]["kind"]) == ("CANCELLED", 13, "cancelled")
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda line: type_line(runs, line), [status["next"][0]] * 2))
    assert sorted(each.returncode for each in done) == [0, 2], done
    refusal = next(each.stderr for each in done if each.returncode)
    assert "is sending" in refusal or "two jobs would write into one run folder" in refusal
    job.id = read_json(job.run.submission_json)["job_id"]
    assert runs.slurm("squeue", "--noheader", "--format=%i").split() == [job.id]


@pytest.mark.parametrize("fault", [signal.SIGSTOP, signal.SIGKILL])
def test_a_slurmstepd_that_hangs_or_is_gone_does_not_keep_a_run_that_has_completed(runs: Runs, fault: int) -> None:
    job = runs.submit(steps=2 * EVERY)
    job.wait_for_step(EVERY)
    stepd = stepd_above(job.pid(1))
    os.kill(stepd, fault)
    try:
        job.wait_for_event("complete")
        completed_at = time.time()
        status = job.wait_for_end()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stepd, signal.SIGCONT)
    assert (status["state"], status["exit_code"], status["attempt"]) == ("COMPLETED", 0, 1)
    # A minute until they are overdue, and two grace periods of srun.
    assert read_json(job.run.attempt_json(1))["ended_at"] - completed_at < 150
    assert "its processes have not ended in 60 s" in job.run.batch_log.read_text()
    assert sorted(job.curve()) == list(range(1, 2 * EVERY + 1)) and newest_checkpoint(job).name.endswith("-8")


def stepd_above(pid: int) -> int:
    """The slurmstepd that started this process."""
    while not Path(f"/proc/{pid}/exe").readlink().name.startswith("slurmstepd"):
        stat = Path(f"/proc/{pid}/stat").read_text()
        pid = int(stat[stat.rindex(")") + 1 :].split()[1])
    return pid


def test_a_submit_while_the_controller_is_away_leaves_nothing_and_works_once_it_is_back(runs: Runs) -> None:
    starter = Starter(layout := layout_of(Path(runs.sandbox.home)), load_running(layout))
    controller = starter.info.daemon(SLURMCTLD)
    assert controller is not None
    line = "janus-cluster submit demo --nodes 2 --cluster sandbox --no-preflight --set slurm.hold=true --json"
    before = folders(runs)
    os.kill(controller.pid, signal.SIGTERM)
    try:
        wait_until(lambda: not is_alive(controller))
        asked_at = time.monotonic()
        refused = type_line(runs, line)
        took_s = time.monotonic() - asked_at
    finally:
        starter.start_slurmctld()
    assert (refused.returncode, folders(runs)) == (21, before), refused
    assert "its controller does not answer" in refused.stderr and "scontrol ping" in refused.stderr and took_s < 90
    wait_until(lambda: "UP" in runs.slurm("scontrol", "ping", check=False))
    done = type_line(runs, line)
    assert done.returncode == 0, done.stderr
    assert runs.slurm("scancel", json.loads(done.stdout)["job_id"]) == ""


def test_a_time_limit_that_was_lowered_costs_no_step(runs: Runs) -> None:
    """An operator makes room for a maintenance: the job is stopped before its new limit, saved, and goes on."""
    job = runs.submit(steps=2000)
    job.wait_for_step(EVERY + 1)
    runs.slurm("scontrol", "update", f"JobId={job.id}", "TimeLimit=4")
    job.wait_until(job.is_running_again, limit_s=400)
    # The new limit is that of the second attempt too, which may be stopped by it already.
    attempt, step = job.resumed_at()[0]
    assert (attempt, step) == (2, max(job.curve(attempt=1))), "saved at the step where it was stopped"
    [stop] = job.events("stop", attempt=1)
    assert stop["step"] == step


def test_a_run_folder_that_was_moved_is_named_and_goes_on_in_its_new_place(runs: Runs) -> None:
    job = runs.submit(steps=STEPS)
    job.wait_for_step(EVERY + 1)
    # Held still, so that the command is typed while the job lives.
    runs.slurm("scontrol", "suspend", job.id)
    was = job.run.path
    moved = RunDir(was.rename(was.with_name("moved")))
    job.run = moved
    refused = type_line(runs, f"janus-cluster resume {moved.path}")
    runs.slurm("scontrol", "resume", job.id)
    assert refused.returncode == 2 and "is SUSPENDED" in refused.stderr, "two jobs would write into one folder"
    job.wait_until(lambda: job.is_in_state(""))
    status = status_of(runs, moved)
    assert not was.exists(), "it is not made anew"
    assert "one more attempt" not in moved.batch_log.read_text(), "it would wait two minutes for a folder that is gone"
    assert first_failed(status) == ("FAILED", "file_system", 0, "h800-01")
    assert f"the run folder {was} is gone" in status["card"]["message"]
    done = type_line(runs, status["next"][0])
    assert done.returncode == 0, done.stderr
    job.id = read_json(moved.submission_json)["job_id"]
    assert job.wait_for_end(attempt=2)["exit_code"] == 0
    requires_nothing_lost(moved, resumed_at=EVERY, steps=STEPS)


def test_a_run_folder_that_is_read_only_on_the_nodes_is_named_and_the_run_goes_on_afterwards(runs: Runs) -> None:
    job = runs.submit(steps=STEPS)
    job.wait_for_step(EVERY + 1)
    with read_only_on_nodes(runs, job.run.path):
        job.wait_until(lambda: job.is_in_state(""))
    status = status_of(runs, job.run)
    assert first_failed(status) == ("FAILED", "read_only", 0, "h800-01")
    look, resume = status["next"]
    assert look.startswith(f"findmnt -T {job.run.path}")
    done = type_line(runs, resume)
    assert done.returncode == 0, done.stderr
    job.id = read_json(job.run.submission_json)["job_id"]
    assert job.wait_for_end(attempt=2)["exit_code"] == 0
    requires_nothing_lost(job.run, resumed_at=EVERY, steps=STEPS)


@contextlib.contextmanager
def read_only_on_nodes(runs: Runs, folder: Path) -> Iterator[None]:
    """The hosts of the sandbox see the folder read-only, as a file server that has lost its disk exports it."""
    info = load_running(layout_of(Path(runs.sandbox.home)))
    if info.mode != "namespaces":
        not_tested("NOT TESTED: a folder that is read-only on the nodes; this sandbox has no hosts of their own")
    pids = [daemon.pid for node in info.node_names if (daemon := info.daemon(slurmd_name(node))) is not None]

    def on_each(*command: str) -> None:
        for pid in pids:
            subprocess.run(["nsenter", f"--mount=/proc/{pid}/ns/mnt", *command, str(folder)], check=True)

    on_each("mount", "--bind", str(folder))
    on_each("mount", "-o", "remount,bind,ro")
    try:
        yield
    finally:
        on_each("umount", "--lazy")


def status_of(runs: Runs, run: RunDir) -> dict[str, Any]:
    done = type_line(runs, f"janus-cluster status {run.path} --json")
    assert done.returncode == 0, done.stderr
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def first_failed(status: dict[str, Any]) -> tuple[Any, ...]:
    return status["state"], status["card"]["kind"], status["card"]["rank"], status["card"]["node"]


def folders(runs: Runs) -> set[str]:
    return {path.name for path in (runs.folder / "runs").glob("*")}
