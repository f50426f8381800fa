from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from janus_cluster.desk.cancel import cancel_run
from janus_cluster.errors import UsageError
from janus_cluster.run.files import write_json_atomically
from janus_cluster.run.paths import RunDir


def make_run(folder: Path, pid: int) -> RunDir:
    run = RunDir(folder / "demo-1")
    run.logs.mkdir(parents=True, exist_ok=True)
    write_json_atomically(
        run.submission_json,
        {"schema_version": 1, "cluster": "local", "job_id": f"local-{pid}", "submitted_at": time.time()},
    )
    return run


def test_local_job_and_its_children_are_ended(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "demo-1")
    run.bundle(1).path.mkdir(parents=True)
    run.bundle(1).job_sbatch.write_text(f"{sys.executable} -c 'import time; time.sleep(600)' & echo $!; wait\n")
    job = subprocess.Popen(["bash", str(run.bundle(1).job_sbatch)], start_new_session=True, stdout=subprocess.PIPE)
    try:
        assert job.stdout is not None
        child = int(job.stdout.readline())
        make_run(tmp_path, job.pid)
        assert "SIGTERM" in cancel_run(run)
        assert job.wait(timeout=600) == -signal.SIGTERM
        deadline = time.monotonic() + 10
        while (Path("/proc") / str(child) / "cmdline").exists() and time.monotonic() < deadline:
            if not (Path("/proc") / str(child) / "cmdline").read_bytes():
                break
            time.sleep(0.05)
        else:
            assert not (Path("/proc") / str(child)).exists()
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
        assert job.stdout is not None
        job.stdout.close()
    with pytest.raises(UsageError, match="is not running: it is FAILED"):
        cancel_run(run)


def test_stranger_with_our_old_pid_is_left_alone(tmp_path: Path) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        with pytest.raises(UsageError, match="is not running"):
            cancel_run(make_run(tmp_path, stranger.pid))
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_run_that_was_never_submitted_cannot_be_cancelled(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "demo-1")
    run.path.mkdir()
    with pytest.raises(UsageError, match="was not submitted"):
        cancel_run(run)


def test_finished_run_shows_how_it_ended(tmp_path: Path) -> None:
    run = make_run(tmp_path, 999_999_999)
    word = {"cluster": "local", "job_id": "local-999999999", "attempt": 1, "state": "COMPLETED", "exit_code": 0}
    write_json_atomically(run.status_json, word)
    with pytest.raises(UsageError, match="it is COMPLETED"):
        cancel_run(run)
