"""What must not end an attempt: a full disk, a file system that lags, a process that cannot be killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from run_files import append_metric_line

from janus_cluster.errors import JanusError
from janus_cluster.job.load import load_job
from janus_cluster.job.resolve import resolve_job
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.job.resources import jobs_dir
from janus_cluster.node.attempt import run_attempt
from janus_cluster.node.batch_log import log_line
from janus_cluster.node.ledger import Ledger
from janus_cluster.node.local_launcher import LocalLauncher
from janus_cluster.node.memory import load_when_visible
from janus_cluster.node.phases import Attempt, StopSignals
from janus_cluster.node.slurm_launcher import SlurmLauncher
from janus_cluster.node.status import StatusWriter
from janus_cluster.node.steps import PhaseProcesses
from janus_cluster.run.files import read_json, write_json_atomically
from janus_cluster.run.paths import BundleDir, RunDir
from janus_cluster.run.records.metrics import read_events


def resolve(folder: Path, *sets: str) -> ResolvedJob:
    loaded = load_job(jobs_dir() / "demo.yaml", sets=sets, environ={})
    return resolve_job(loaded, run_dir=folder, cluster="local", environ={}, cwd=folder, python=sys.executable)


def test_a_status_that_cannot_be_written_now_is_no_end_and_is_written_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path / "run")
    status = StatusWriter(run, cluster="slurm", job_id="7", attempt=1, nodes=["h800-01"])
    status.update(phase="training")
    assert not status.is_written
    output = capsys.readouterr().out
    assert output.count("ENOENT") == 1 and str(run.status_json) in output, "printed once, not every 15 s"
    run.path.mkdir()
    status.update()
    assert status.is_written and read_json(run.status_json)["phase"] == "training"


def test_an_end_that_cannot_be_recorded_is_still_an_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(tmp_path)
    ledger = Ledger(run, attempt=run.begin_attempt(), job_id="7", nodes=["h800-01"], bundle=1)
    shutil.rmtree(run.attempt_logs(1))
    ledger.end("STOPPED", 13, "SIGUSR1")
    assert "attempt.json: ENOENT" in capsys.readouterr().out


def test_a_full_disk_costs_the_attempt_its_log_lines_only() -> None:
    code = f"from {log_line.__module__} import log_line; log_line('line'); import os; os._exit(7)"
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, check=False, timeout=600)
    assert done.returncode == 7


def test_a_torn_line_of_metrics_spoils_no_other(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    append_metric_line(run, {"kind": "train", "step": 1})
    with run.metrics_jsonl.open("a") as f:
        f.write('{"kind": "train", "st')
    append_metric_line(run, {"kind": "resume", "step": 0})
    append_metric_line(run, {"kind": "train", "step": 1})
    assert [(event.KIND, event.step) for event in read_events(run)] == [("train", 1), ("resume", 0), ("train", 1)]


class Unkillable(subprocess.Popen[bytes]):
    """A process that hangs in the kernel: no signal ends it."""

    def send_signal(self, sig: int) -> None:
        pass


def test_a_process_that_cannot_be_killed_does_not_hold_the_attempt(capsys: pytest.CaptureFixture[str]) -> None:
    stuck = Unkillable([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        step = PhaseProcesses([stuck], end_together=True, grace_s=0.2)
        begun = time.monotonic()
        assert step.wait(timeout_s=None, on_wait=lambda s: s.terminate()) == 128 + 9
        assert time.monotonic() - begun < 10
        assert f"process {stuck.pid} cannot be killed" in capsys.readouterr().out
    finally:
        os.kill(stuck.pid, 9)
        stuck.wait()


class Sleeping(LocalLauncher):
    """One node, whose task does nothing for a minute."""

    def start(self, task_argv: Sequence[str], *, end_together: bool) -> PhaseProcesses:
        self.process = subprocess.Popen(["sleep", "60"])
        return PhaseProcesses([self.process], end_together=end_together)


@pytest.mark.slow
def test_an_attempt_that_was_taken_for_lost_leaves_the_run_folder_to_the_newer_one(tmp_path: Path) -> None:
    run, launcher = RunDir(tmp_path), Sleeping(1)
    attempt = Attempt(run, resolve(tmp_path, "preflight.enabled=false"), launcher, StopSignals())

    def begin_elsewhere() -> None:
        write_json_atomically(run.status_json, {"attempt": run.begin_attempt()})

    later = threading.Timer(5, begin_elsewhere)
    later.start()
    assert run_attempt(attempt) == 1
    later.join()
    assert launcher.process.poll() is not None, "its ranks would write checkpoints"
    assert read_json(run.status_json) == {"attempt": 2}
    assert "attempt 2 has begun" in read_json(run.attempt_json(1))["reason"]


@pytest.mark.slow
def test_a_stop_that_cannot_be_sent_to_the_ranks_ends_them_in_time(tmp_path: Path) -> None:
    run, stop = RunDir(tmp_path), StopSignals()
    attempt = Attempt(run, resolve(tmp_path, "restart.stop_timeout_s=1"), Sleeping(1), stop)
    shutil.rmtree(run.attempt_logs(1))
    stop.note(signal.SIGUSR1)
    assert attempt.run_training_phase() == 128 + signal.SIGTERM


def test_a_bundle_that_a_node_does_not_see_yet_is_waited_for(tmp_path: Path) -> None:
    run, resolved = RunDir(tmp_path), resolve(tmp_path)
    run.bundles.mkdir()
    staging = BundleDir(tmp_path / "staging")
    staging.path.mkdir()
    staging.resolved_json.write_text(resolved.model_dump_json())
    later = threading.Timer(0.3, lambda: staging.path.rename(run.bundle(2).path))
    later.start()
    assert load_when_visible(run, 2, limit_s=20) == resolved
    later.join()
    with pytest.raises(JanusError, match=r"bundles/3/resolved\.json: this node does not see it"):
        load_when_visible(run, 3, limit_s=0)


TASK = """
import os, sys, time
from janus_cluster.node.task import end_with_the_attempt
end_with_the_attempt(os.environ)
print(os.getpid(), flush=True)
time.sleep(60)
"""
ATTEMPT = """
import sys
from janus_cluster.node.local_launcher import LocalLauncher
task = [sys.executable, "-c", sys.argv[1]]
LocalLauncher(1).start(task, end_together=True).wait(timeout_s=None, on_wait=lambda step: None)
"""


def test_on_one_machine_no_rank_outlives_the_attempt() -> None:
    with subprocess.Popen([sys.executable, "-c", ATTEMPT, TASK], stdout=subprocess.PIPE) as attempt:
        assert attempt.stdout is not None
        task = Path("/proc", attempt.stdout.readline().decode().strip())
        assert task.exists()
        attempt.kill()
    deadline = time.monotonic() + 20
    while lives(task):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def lives(process: Path) -> bool:
    """Whether the process is there, and is no zombie."""
    try:
        return " Z " not in (process / "stat").read_text()
    except OSError:
        return False


@pytest.mark.slow
def test_a_controller_that_is_away_for_a_moment_still_gets_the_requeue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "scontrol"
    program.write_text(
        f"#!/bin/sh\necho x >> {tmp_path}/asked\n[ $(wc -l < {tmp_path}/asked) -ge 2 ] && exit 0\n"
        "echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert SlurmLauncher("slurm", "7", ("h800-01",)).requeue() is None
    assert (tmp_path / "asked").read_text() == "x\nx\n"
    program.write_text("#!/bin/sh\necho 'Requested operation is presently disabled' >&2; exit 1\n")
    assert "presently disabled" in str(SlurmLauncher("slurm", "7", ("h800-01",)).requeue())
