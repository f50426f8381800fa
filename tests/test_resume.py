"""resume and cancel as a user types them, on jobs that are processes of this machine."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from janus_cluster.rundir import RunDir, read_json, write_json_atomically

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def janus(tmp_path: Path) -> Run:
    (tmp_path / "demo_data" / "episode").mkdir(parents=True)

    def call(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "janus_cluster.cli", *argv],
            cwd=tmp_path,
            env=os.environ | {"JANUS_HOME": str(tmp_path / "home")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    return call


@pytest.fixture
def run(janus: Run) -> Iterator[RunDir]:
    """A run folder of this machine whose script sleeps; what was started is ended with the test."""
    done = janus("submit", "demo", "--cluster", "local", "--dry-run", "--json")
    found = RunDir(Path(json.loads(done.stdout)["run_dir"]))
    found.job_sbatch.write_text("echo begun; sleep 600 & wait\n")
    yield found
    janus("cancel", str(found.path), "--yes")


def sent(run: RunDir) -> dict[str, object]:
    value: dict[str, object] = read_json(run.submission_json)
    return value


def wait_until_gone(run: RunDir) -> None:
    pid = str(sent(run)["job_id"]).removeprefix("local-")
    deadline = time.monotonic() + 20
    while (Path("/proc") / pid / "cmdline").exists() and (Path("/proc") / pid / "cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def say(run: RunDir, **word: object) -> None:
    base = {"cluster": "local", "job_id": sent(run)["job_id"], "attempt": 1, "nodes": ["local-01"], "state": "RUNNING"}
    write_json_atomically(run.status_json, base | {"started_at": time.time(), "updated_at": time.time()} | word)


def test_an_ended_run_goes_on_in_its_own_folder_and_a_live_one_is_refused(janus: Run, run: RunDir) -> None:
    assert janus("resume", str(run.path)).returncode == 0
    first = sent(run)["job_id"]
    refused = janus("resume", run.name)
    assert refused.returncode == 2
    assert "is RUNNING" in refused.stderr
    assert f"janus-cluster cancel {first}" in refused.stderr
    assert sent(run)["job_id"] == first
    assert janus("cancel", str(first)).returncode == 0
    wait_until_gone(run)
    checkpoint = run.checkpoints / "checkpoint-40"
    checkpoint.mkdir(parents=True)
    write_json_atomically(checkpoint / "manifest.json", {"files_bytes": {}})
    done = janus("resume", run.name)
    assert done.returncode == 0, done.stderr
    assert "goes on from  checkpoint-40" in done.stdout
    value = sent(run)
    assert f"janus-cluster tail {value['job_id']}" in done.stdout
    assert value["job_id"] != first
    assert [h["job_id"] for h in value["history"]] == [first]  # type: ignore[attr-defined]
    assert run.batch_log.read_text().count("begun") >= 1


def test_a_completed_run_is_not_resumed(janus: Run, run: RunDir) -> None:
    janus("resume", str(run.path))
    say(run, state="COMPLETED", exit_code=0)
    done = janus("resume", run.name)
    assert done.returncode == 2
    assert "has completed" in done.stderr
    assert f"janus-cluster submit {run.job_yaml}" in done.stderr


def test_a_run_that_never_resumes_is_refused(janus: Run) -> None:
    done = janus("submit", "demo", "--cluster", "local", "--dry-run", "--json", "--set", "checkpoint.resume=never")
    refused = janus("resume", json.loads(done.stdout)["run_dir"])
    assert refused.returncode == 2
    assert "begin at step 0 over its own results" in refused.stderr


def test_two_resumes_at_once_are_refused(janus: Run, run: RunDir) -> None:
    with run.submit_lock.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused = janus("resume", run.name)
    assert refused.returncode == 2
    assert "another janus-cluster is sending" in refused.stderr
    assert not run.submission_json.exists()


def test_a_folder_that_is_no_run_is_told(janus: Run, run: RunDir) -> None:
    run.resolved_json.write_text("{}")
    refused = janus("resume", str(run.path))
    assert refused.returncode == 2
    assert "cannot be read by this version" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("minutes_of_attempt", "minutes_of_checkpoint", "is_asked"),
    [(9, None, False), (11, None, True), (60, 5, False), (60, 30, True)],
)
def test_cancel_asks_when_much_would_be_lost(
    janus: Run, run: RunDir, minutes_of_attempt: float, minutes_of_checkpoint: float | None, is_asked: bool
) -> None:
    janus("resume", str(run.path))
    say(run, started_at=time.time() - 60 * minutes_of_attempt)
    if minutes_of_checkpoint is not None:
        folder = run.checkpoints / "checkpoint-7"
        folder.mkdir(parents=True)
        write_json_atomically(folder / "manifest.json", {"files_bytes": {}})
        when = time.time() - 60 * minutes_of_checkpoint
        os.utime(folder / "manifest.json", (when, when))
    done = janus("cancel", run.name)
    if not is_asked:
        assert done.returncode == 0, done.stderr
        return
    since = "checkpoint-7" if minutes_of_checkpoint else "the start of attempt 1"
    minutes = minutes_of_checkpoint or minutes_of_attempt
    assert done.returncode == 2
    assert f"would lose {minutes} minutes of work since {since}" in done.stderr
    assert f"next:  janus-cluster cancel {run.name} --yes" in done.stderr
    assert janus("cancel", run.name, "--yes").returncode == 0
