"""Nothing lost: every fault on a real two-node Slurm, and the loss curve afterwards against the uninterrupted one's."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from janus_cluster.rundir import RunDir, read_json
from janus_cluster.sandbox import SandboxInfo, down, fault, heal, up
from janus_cluster.sandbox.hosts import SLURMCTLD, Starter
from janus_cluster.sandbox.layout import layout_of
from janus_cluster.sandbox.lifecycle import load_running

pytestmark = pytest.mark.slurm

Curve = dict[int, float]
EVERY = 4
# What status.json may say before what is waited for: the last two between two attempts.
ON_THE_WAY = ("RUNNING", "STOPPED", "CANCELLED")
STEPS = 20
# The gate is the other test files' subject; a constant rate makes the curve independent of the number of steps.
JOB = (
    "--no-preflight",
    *("--set", "training.logging_steps=1"),
    *("--set", "training.lr_scheduler=constant"),
    *("--set", "training.warmup_ratio=0"),
    *("--set", f"checkpoint.every_steps={EVERY}"),
    *("--set", "checkpoint.export=false"),
    *("--set", "preflight.use_node_memory=false"),
)


class Runs:
    """janus-cluster and Slurm for the tests of this file, with a home of their own around the session's sandbox."""

    def __init__(self, folder: Path, sandbox: SandboxInfo, *, data: Path) -> None:
        self.folder = folder
        self.sandbox = sandbox
        self.data = data
        self.jobs: list[Job] = []
        (folder / "sandbox").symlink_to(sandbox.home)

    def janus(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "janus_cluster.cli", *argv],
            cwd=self.folder,
            env=os.environ | {"JANUS_HOME": str(self.folder), "DEMO_DATA": str(self.data)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )

    def slurm(self, *argv: str, check: bool = True) -> str:
        environ = os.environ | self.sandbox.env()
        done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=check, timeout=600)
        return done.stdout

    def submit(self, *sets: str, steps: int = STEPS) -> Job:
        done = self.janus(
            *("submit", "demo", "--nodes", "2", "--cluster", "sandbox", "--json", *JOB),
            *("--set", f"training.max_steps={steps}"),
            *(word for value in sets for word in ("--set", value)),
        )
        assert done.returncode == 0, done.stderr
        value = json.loads(done.stdout)
        self.jobs.append(Job(self, RunDir(Path(value["run_dir"])), value["job_id"]))
        return self.jobs[-1]

    def end_all(self) -> None:
        """No job of this file is in the queue any more: one that a failed test left would hold up all that follow."""
        while self.jobs:
            self.jobs.pop().end()


class Job:
    """One submitted run, watched through its files."""

    def __init__(self, runs: Runs, run: RunDir, job_id: str) -> None:
        self.runs = runs
        self.run = run
        self.id = job_id
        self.pending_since_s: float | None = None

    def wait_for_step(self, step: int, *, attempt: int = 1) -> None:
        self.wait_until(lambda: any(e["step"] >= step and e["attempt"] >= attempt for e in self.events("train")))

    def wait_for_event(self, kind: str) -> None:
        self.wait_until(lambda: bool(self.events(kind)))

    def wait_for_end(self, state: str = "COMPLETED", *, attempt: int = 1) -> dict[str, Any]:
        """The run's status once it is in `state`; a requeued job does not wait for the two minutes of Slurm."""

        def is_over() -> bool:
            own = read_json(self.run.status_json) if self.run.status_json.exists() else {"state": None, "attempt": 0}
            if own["attempt"] >= attempt:
                assert own["state"] in (state, *ON_THE_WAY), self.everything()
                if own["state"] == state:
                    return True
            self.begin_if_requeued()
            return False

        self.wait_until(is_over, pause_s=1.0)
        # The ladder's word, once Slurm has noticed, too.
        self.wait_until(lambda: self.status()["state"] == state, pause_s=1.0, limit_s=60)
        return self.status()

    def begin_if_requeued(self) -> None:
        """A requeued job does not wait for two minutes; but begun in the second of its requeue, slurmd refuses it."""
        if self.slurm_state() != "PENDING":
            self.pending_since_s = None
        elif self.pending_since_s is None:
            self.pending_since_s = time.monotonic()
        elif time.monotonic() - self.pending_since_s > 4:
            self.runs.slurm("scontrol", "update", f"JobId={self.id}", "StartTime=now", check=False)

    def slurm_state(self) -> str:
        return self.runs.slurm("squeue", "--noheader", f"--jobs={self.id}", "--format=%T", check=False).strip()

    def is_in_state(self, state: str) -> bool:
        """Whether that is what squeue says; "" of a job that is no more."""
        return self.slurm_state() == state

    def is_running_again(self) -> bool:
        """Whether the second attempt has done a step."""
        self.begin_if_requeued()
        return bool(self.events("train", attempt=2))

    def end(self) -> None:
        """Slurm has forgotten the job."""
        self.runs.slurm("scancel", self.id, check=False)
        self.wait_until(partial(self.is_in_state, ""), limit_s=180)

    def status(self) -> dict[str, Any]:
        done = self.runs.janus("status", self.id, "--json")
        assert done.returncode == 0, done.stderr
        value: dict[str, Any] = json.loads(done.stdout)
        return value | {"attempt": value["attempt"] or 0}

    def words(self) -> str:
        return self.runs.janus("status", self.id).stdout

    def events(self, kind: str, *, attempt: int | None = None) -> list[dict[str, Any]]:
        found = [e for e in self.run.read_metrics() if e["kind"] == kind]
        return [e for e in found if attempt in (None, e["attempt"])]

    def curve(self, *, attempt: int | None = None) -> Curve:
        """Step → loss; of a step that was done twice, the last."""
        return {e["step"]: e["loss"] for e in self.events("train", attempt=attempt)}

    def pid(self, rank: int) -> int:
        return int(read_json(self.run.heartbeat_json(1, rank))["pid"])

    def requires(self, reference: Curve, *, steps: int = STEPS) -> None:
        """Every step is there, and each loss is that of the run that nothing happened to, bit for bit."""
        curve = self.curve()
        assert sorted(curve) == list(range(1, steps + 1)), self.everything()
        assert {s: loss for s, loss in curve.items() if s in reference} == {
            s: loss for s, loss in reference.items() if s <= steps
        }

    def resumed_at(self) -> list[tuple[int, int]]:
        """(attempt, step) of every resume; the attempt's first step is the next one."""
        found = [(e["attempt"], e["step"]) for e in self.events("resume")]
        for attempt, step in found:
            assert min(self.curve(attempt=attempt)) == step + 1
        return found

    def everything(self) -> str:
        logs = [self.run.batch_log, *sorted(self.run.logs.glob("attempt_*/*.log"))]
        return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-2500:]}" for p in logs if p.exists())

    def wait_until(self, is_done: Callable[[], bool], *, pause_s: float = 0.2, limit_s: float = 600) -> None:
        """Nothing is waited for longer than `limit_s` without a step: how fast steps are is the machine's business."""
        deadline, size = time.monotonic() + limit_s, -1
        while not is_done():
            if (grown := self.metrics_bytes()) != size:
                deadline, size = time.monotonic() + limit_s, grown
            assert time.monotonic() < deadline, self.everything()
            time.sleep(pause_s)

    def metrics_bytes(self) -> int:
        return self.run.metrics_jsonl.stat().st_size if self.run.metrics_jsonl.exists() else 0


@pytest.fixture(scope="module")
def runs(sandbox: SandboxInfo, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("reliability")
    data = folder / "demo_data"
    command = [sys.executable, "-m", "janus_cluster.training.data.demo", str(data), "--episodes", "6"]
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


def test_a_rank_that_stands_still_is_named_and_its_run_goes_on(runs: Runs, reference: Curve) -> None:
    job = runs.submit("training.hang_timeout_s=12")
    job.wait_for_step(EVERY + 1)
    os.kill(job.pid(1), signal.SIGSTOP)
    status = job.wait_for_end(attempt=2)
    assert (status["state"], status["exit_code"]) == ("COMPLETED", 0)
    hang = read_json(job.run.attempt_json(1))["hang"]
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
    assert "2 attempts got no further" in job.run.batch_log.read_text()
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
    said = job.run.rank_log(2, "h800-01", 0).read_text()
    assert f"checkpoint-{newest}" in said and "sha256" in said
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
