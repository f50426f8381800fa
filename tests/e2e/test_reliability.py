"""Nothing lost: every fault on a real two-node Slurm, and the loss curve afterwards against the uninterrupted one's."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from demo_runs import EVERY, Curve, Runs

from janus_cluster.run.files import read_json
from janus_cluster.sandbox import SandboxInfo, down, fault, heal, up
from janus_cluster.sandbox.hosts import SLURMCTLD, Starter
from janus_cluster.sandbox.layout import layout_of
from janus_cluster.sandbox.lifecycle import load_running

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def runs(sandbox: SandboxInfo, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("reliability")
    data = folder / "demo_data"
    command = [sys.executable, "-m", "janus_cluster.janusvln.world.demo", str(data), "--episodes", "6"]
    subprocess.run(command, check=True, capture_output=True)
    return Runs(folder, sandbox, data=data)


@pytest.fixture(autouse=True)
def nothing_is_left(runs: Runs) -> Iterator[None]:
    """Each test begins with an idle Slurm."""
    yield
    runs.end_all()


@pytest.fixture(scope="module")
def reference(runs: Runs) -> Curve:
    """The losses of a run that nothing happens to, for as many steps as the others do and a few after they go on."""
    job = runs.submit("checkpoint.every_steps=1000", steps=300)
    job.wait_for_end()
    curve = job.curve()
    assert sorted(curve) == list(range(1, 301))
    return curve


@pytest.fixture
def healthy(sandbox: SandboxInfo) -> Iterator[Path]:
    """The sandbox's folder; faults of the test are undone after it."""
    yield Path(sandbox.home)
    heal(Path(sandbox.home))


@pytest.mark.parametrize(
    "signal_and_whom",
    # The last one is what Slurm does at a preemption with a grace time.
    [("--signal=USR1", "--batch"), ("--signal=USR1",), ("--signal=TERM",)],
    ids=["USR1 to the batch shell", "USR1 to the ranks", "TERM to the ranks"],
)
def test_a_stop_signal_saves_at_a_step_boundary_and_the_job_goes_on_by_itself(
    runs: Runs, reference: Curve, signal_and_whom: Sequence[str]
) -> None:
    job = runs.submit()
    job.wait_for_step(EVERY + 1)
    runs.slurm("scancel", *signal_and_whom, job.id)
    job.wait_for_event("stop")
    status = job.wait_for_end(attempt=2)
    assert (status["state"], status["exit_code"], status["attempt"]) == ("COMPLETED", 0, 2)
    stopped = [e["step"] for e in job.events("stop")]
    assert job.resumed_at() == [(2, stopped[0])], "not one step is done twice"
    assert max(job.curve(attempt=1)) == stopped[0]
    assert read_json(job.run.attempt_json(1))["exit_code"] == 13
    job.requires(reference)


def test_a_job_that_is_cancelled_while_it_stops_is_not_queued_again(runs: Runs) -> None:
    job = runs.submit()
    job.wait_for_step(EVERY + 1)
    runs.slurm("scancel", "--signal=USR1", "--batch", job.id)
    job.wait_until(job.run.stop_json(1).exists)
    runs.slurm("scancel", job.id)
    status = job.wait_for_end("CANCELLED")
    assert status["exit_code"] == 13
    [stopped] = job.events("stop")
    assert stopped["step"] == max(job.curve()), "and what it had done is saved"
    job.wait_until(lambda: job.is_in_state("CANCELLED") or job.is_in_state(""))
    assert job.run.attempts() == [1]


def test_the_walltime_is_no_end(runs: Runs, reference: Curve) -> None:
    # Slurm looks every half minute: it signals 60 to 90 s before the end, when training is on its way.
    job = runs.submit("slurm.time=00:02:00", "slurm.signal=B:USR1@60", steps=2000)
    job.wait_for_event("stop")
    # The second attempt is given the time that it needs; else a slow machine would make many of it.
    runs.slurm("scontrol", "update", f"JobId={job.id}", "TimeLimit=00:30:00")
    job.wait_until(job.is_running_again, pause_s=1.0)
    stopped = job.events("stop")[0]["step"]
    assert job.resumed_at() == [(2, stopped)], "not one step is done twice"
    assert stopped + 1 in reference, "the losses after it are compared, too"
    job.end()
    assert read_json(job.run.attempt_json(1))["exit_code"] == 13
    job.requires(reference, steps=max(job.curve()))


def test_a_requeue_from_outside_goes_on_from_the_newest_checkpoint(runs: Runs, reference: Curve) -> None:
    job = runs.submit()
    job.wait_for_step(EVERY + 1)
    runs.slurm("scontrol", "requeue", job.id)
    status = job.wait_for_end(attempt=2)
    assert (status["state"], status["exit_code"]) == ("COMPLETED", 0)
    [(attempt, step)] = job.resumed_at()
    assert attempt == 2 and step >= EVERY
    job.requires(reference)


def test_a_killed_worker_costs_the_steps_since_the_checkpoint(runs: Runs, reference: Curve) -> None:
    job = runs.submit()
    job.wait_for_step(EVERY + 1)
    os.kill(job.pid(1), signal.SIGKILL)
    status = job.wait_for_end(attempt=2)
    assert (status["state"], status["exit_code"], status["job_id"]) == ("COMPLETED", 0, job.id)
    [(attempt, step)] = job.resumed_at()
    assert attempt == 2 and step >= EVERY
    assert "rank 1 on h800-02: SIGKILL" in read_json(job.run.attempt_json(1))["reason"]
    job.requires(reference)


def test_a_rank_that_hangs_is_named_and_its_run_goes_on(runs: Runs, reference: Curve) -> None:
    job = runs.submit("training.hang_timeout_s=12")
    job.wait_for_step(EVERY + 1)
    os.kill(job.pid(1), signal.SIGSTOP)
    stopped_at = time.time()
    status = job.wait_for_end(attempt=2)
    assert (status["state"], status["exit_code"]) == ("COMPLETED", 0)
    ended = read_json(job.run.attempt_json(1))
    assert ended["ended_at"] - stopped_at < 12 + 60
    collective = re.search(
        r"rank 1 on h800-02 did not join \w+ #\d+.* in which rank 0 waits", ended["failure"]["message"]
    )
    assert collective is not None, ended["failure"]
    hang = ended["hang"]
    assert (hang["rank"], hang["node"]) == (1, "h800-02")
    assert "gives no sign of life" in hang["message"]
    assert "the stacks:" in job.run.rank_log(1, "h800-01", 0).read_text(), "where the others waited is in their logs"
    job.requires(reference)


def test_a_fault_that_never_goes_away_ends_the_job(runs: Runs) -> None:
    job = runs.submit("restart.max_without_progress=2", "checkpoint.every_steps=1000", steps=400)
    for attempt in (1, 2):
        job.wait_for_step(1, attempt=attempt)
        os.kill(int(read_json(job.run.heartbeat_json(attempt, 1))["pid"]), signal.SIGKILL)
    status = job.wait_for_end("FAILED", attempt=2)
    assert (status["state"], status["exit_code"], status["attempt"]) == ("FAILED", 12, 2)
    assert "2 attempts made no progress" in job.run.batch_log.read_text()
    assert "rank 1 on h800-02" in job.words()


def test_a_lost_node_brings_the_job_back_when_there_are_nodes(runs: Runs, reference: Curve, healthy: Path) -> None:
    # More steps than are done until Slurm gives a silent node up, which takes it 15 s to a minute.
    job = runs.submit("restart.on_stop=end", steps=2000)
    job.wait_for_step(EVERY + 1)
    fault(healthy, "stop-slurmd", "h800-02")
    job.wait_until(lambda: job.slurm_state() == "PENDING", pause_s=1.0)
    left_behind = job.pid(1)
    heal(healthy)
    # This is what Slurm's two minutes are for: the slurmd that is back ends what it finds of the job, old or new.
    job.wait_until(lambda: not Path(f"/proc/{left_behind}").exists())
    time.sleep(10)
    job.wait_until(job.is_running_again, pause_s=1.0)
    [(attempt, step)] = job.resumed_at()
    assert attempt == 2 and step >= EVERY
    runs.slurm("scancel", "--signal=USR1", "--batch", job.id)
    assert job.wait_for_end("STOPPED", attempt=2)["exit_code"] == 13
    assert "a node was lost: h800-02" in job.words(), job.words()
    job.requires(reference, steps=max(job.curve()))


def test_a_new_slurmctld_does_not_disturb_the_run(runs: Runs, reference: Curve) -> None:
    job = runs.submit()
    job.wait_for_step(EVERY)
    layout = layout_of(Path(runs.sandbox.home))
    starter = Starter(layout, load_running(layout))
    controller = starter.info.daemon(SLURMCTLD)
    assert controller is not None
    os.kill(controller.pid, signal.SIGTERM)
    job.wait_for_step(EVERY + 3)
    starter.start_slurmctld()
    status = job.wait_for_end()
    assert (status["state"], status["exit_code"], status["attempt"]) == ("COMPLETED", 0, 1)
    assert job.resumed_at() == []
    job.requires(reference)


def test_a_bit_that_flipped_in_the_newest_checkpoint_costs_one_checkpoint(runs: Runs, reference: Curve) -> None:
    job = runs.submit("restart.on_stop=end")
    job.wait_for_step(2 * EVERY + 1)
    runs.slurm("scancel", "--signal=USR1", "--batch", job.id)
    status = job.wait_for_end("STOPPED")
    assert status["exit_code"] == 13
    newest, before = sorted(int(p.name.rpartition("-")[2]) for p in job.run.checkpoints.glob("checkpoint-*"))[::-1]
    flip_a_bit(max((job.run.checkpoints / f"checkpoint-{newest}").rglob("*_states.pt"), key=lambda p: p.stat().st_size))
    done = runs.janus("resume", job.run.name)
    assert done.returncode == 0, done.stderr
    job.id = read_json(job.run.submission_json)["job_id"]
    status = job.wait_for_end(attempt=2)
    assert (status["state"], status["exit_code"]) == ("COMPLETED", 0)
    assert job.resumed_at() == [(2, before)]
    output = job.run.rank_log(2, "h800-01", 0).read_text()
    assert f"checkpoint-{newest}" in output and "sha256" in output
    job.requires(reference)


def flip_a_bit(path: Path) -> None:
    with path.open("r+b") as f:
        f.seek(path.stat().st_size // 2)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 1]))


@pytest.fixture
def small_disk(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Runs whose folder is a file system of 40 MB; both nodes see it, being made after it: hence a Slurm of its own."""
    folder = tmp_path_factory.mktemp("small")
    home = tmp_path_factory.mktemp("s") / "sandbox"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "janus-small", str(folder)], check=True)
    try:
        yield Runs(folder, up(home), data=runs.data)
    finally:
        down(home)
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_last_good_checkpoint(reference: Curve, small_disk: Runs) -> None:
    job = small_disk.submit()
    job.wait_for_event("checkpoint")
    filler, room = small_disk.folder / "filler", os.statvfs(small_disk.folder)
    free = room.f_bavail * room.f_frsize
    filler.write_bytes(b"\0" * max(0, free - 300_000))
    status = job.wait_for_end("FAILED")
    assert (status["state"], status["exit_code"]) == ("FAILED", 12), job.everything()
    assert "[disk_full]" in job.words()
    assert "df -h" in job.words()
    good = max(int(p.name.rpartition("-")[2]) for p in job.run.checkpoints.glob("checkpoint-*"))
    filler.unlink()
    assert small_disk.janus("resume", job.run.name).returncode == 0
    job.id = read_json(job.run.submission_json)["job_id"]
    job.wait_for_end(attempt=2)
    assert job.resumed_at() == [(2, good)]
    job.requires(reference)


def test_an_unreadable_image_is_named_and_mending_it_loses_nothing(runs: Runs, reference: Curve) -> None:
    job = runs.submit("data.on_bad=fail", "slurm.hold=true")
    images = sorted(p for p in runs.data.rglob("*") if p.suffix in (".png", ".jpg"))
    whole = {path: path.read_bytes() for path in images}
    try:
        for path, data in whole.items():
            # The first and last bytes stay, as after a torn write: the index, made by the reference run, sees a file.
            path.write_bytes(data[:60] + b"\0" * (len(data) - 80) + data[-20:])
        runs.slurm("scontrol", "release", job.id)
        status = job.wait_for_end("FAILED")
    finally:
        for path, data in whole.items():
            path.write_bytes(data)
    assert (status["state"], status["exit_code"]) == ("FAILED", 12), job.everything()
    assert "[bad_data]" in job.words()
    assert str(runs.data) in job.words()
    assert runs.janus("resume", job.run.name).returncode == 0
    job.id = read_json(job.run.submission_json)["job_id"]
    runs.slurm("scontrol", "release", job.id)
    job.wait_for_end(attempt=2)
    job.requires(reference)


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(runs: Runs) -> None:
    # The weight of the action loss is 0 at the first step, and more than a 32-bit float can hold at the second.
    ramp = ("training.action_loss_weight=1e39", "training.action_loss_ramp_steps=2")
    job = runs.submit(*ramp, "checkpoint.every_steps=1")
    status = job.wait_for_end("FAILED")
    assert (status["state"], status["exit_code"], status["attempt"]) == ("FAILED", 12, 1)
    assert "[diverged]" in job.words()
    assert "training.learning_rate" in job.words()
    assert [step for step, loss in job.curve().items() if math.isfinite(loss)] == [1]
    assert [p.name for p in job.run.checkpoints.glob("checkpoint-*")] == ["checkpoint-1"]
