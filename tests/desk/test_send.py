"""Submitting under interruption: at whatever moment the signal comes, there is a submitted run or there is nothing."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from janus_cluster.desk.send import run_locked, signals_held
from janus_cluster.errors import UsageError
from janus_cluster.run.files import write_json_atomically
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.submission import SubmissionRecord
from tests.tiny_data import write_tiny_data

# An sbatch that takes its time: it prints when it began, and when the job was accepted.
SBATCH = """\
#!/bin/sh
touch "{mark}.began"
sleep 0.8
touch "{mark}.accepted"
echo "Submitted batch job 7"
"""


def start_submit(folder: Path) -> subprocess.Popen[str]:
    """`janus-cluster submit demo` in a session of its own, as a terminal has it: signals reach sbatch, too."""
    (folder / "bin").mkdir(parents=True)
    write_tiny_data(folder / "demo_data")
    for name, text in (("sbatch", SBATCH.format(mark=folder / "sbatch")), ("srun", "#!/bin/sh\n")):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    environ = os.environ | {
        "JANUS_HOME": str(folder / "home"),
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "janus_cluster.cli", "submit", "demo"],
        cwd=folder,
        env=environ,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def left_behind(folder: Path) -> list[Path]:
    runs = folder / "home" / "runs"
    return sorted(runs.iterdir()) if runs.exists() else []


def test_ctrl_c_while_sbatch_works_leaves_a_recorded_run(tmp_path: Path) -> None:
    process = start_submit(tmp_path)
    deadline = time.monotonic() + 30
    while not (tmp_path / "sbatch.began").exists():
        assert time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130, out + err
    assert (tmp_path / "sbatch.accepted").exists(), "the signal reached sbatch"
    (run,) = left_behind(tmp_path)
    assert json.loads(RunDir(run).submission_json.read_text())["job_id"] == "7"
    assert "one moment" in err
    assert "submitted as job 7 nevertheless; janus-cluster cancel 7 ends it" in err


@pytest.mark.slow
def test_a_signal_at_any_moment_leaves_a_submitted_run_or_nothing(tmp_path: Path) -> None:
    moments = [
        (delay_ms, signum) for delay_ms in (150, 500, 900, 1300, 1800) for signum in (signal.SIGINT, signal.SIGTERM)
    ]
    began = time.monotonic()
    processes = [start_submit(tmp_path / f"{delay_ms}-{signum}") for delay_ms, signum in moments]
    for (delay_ms, signum), process in zip(moments, processes, strict=True):
        time.sleep(max(0.0, began + delay_ms / 1000 - time.monotonic()))
        if process.poll() is None:
            os.killpg(process.pid, signum)
    for (delay_ms, signum), process in zip(moments, processes, strict=True):
        out, err = process.communicate(timeout=600)
        folder = tmp_path / f"{delay_ms}-{signum}"
        runs = left_behind(folder)
        accepted = (folder / "sbatch.accepted").exists()
        assert len(runs) == int(accepted), (delay_ms, signum, out, err, runs)
        assert all(RunDir(run).submission_json.exists() for run in runs)
        assert process.returncode in (0, 130, -signal.SIGTERM, -signal.SIGINT), err


def test_a_held_signal_is_delivered_afterwards_and_once() -> None:
    steps = []
    # A test run in the background of a shell starts with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        with signals_held("x") as arrived:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            steps.append("done all the same")
            assert arrived == [signal.SIGINT]
        steps.append("never")
    assert steps == ["done all the same"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_one_at_a_time_sends_a_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with run.submit_lock.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another janus-cluster is sending"), run_locked(run):
            pass
    with run_locked(run):
        pass


def test_the_history_is_flat_and_in_order(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert SubmissionRecord.load(run.submission_json) is None
    sent = {"schema_version": 1, "cluster": "slurm", "submitted_at": 1.0, "slurm_conf": None}
    value = sent | {"job_id": "2", "history": [sent | {"job_id": "1"}]}
    write_json_atomically(run.submission_json, value)
    record = SubmissionRecord.require(run.submission_json)
    assert [one.job_id for one in record.all()] == ["1", "2"]
    later = SubmissionRecord(cluster="slurm", job_id="3", history=record.all()).to_json()
    assert [one["job_id"] for one in later["history"]] == ["1", "2"]
    assert not any("history" in one for one in later["history"])
