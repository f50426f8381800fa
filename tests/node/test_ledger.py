from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from janus_cluster.errors import UsageError
from janus_cluster.node.ledger import Ledger, completed_attempt
from janus_cluster.node.lock import run_folder_held
from janus_cluster.run.files import read_json, write_json_atomically
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.metrics import TrainEvent, append_event


def begin(run: RunDir, *, job_id: str = "7", bundle: int = 1) -> Ledger:
    attempt = run.begin_attempt()
    return Ledger(run, attempt=attempt, job_id=job_id, nodes=["h800-01"], bundle=bundle)


def save_checkpoint(run: RunDir, step: int) -> None:
    folder = run.checkpoints / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"1234")
    files = {"weights": {"bytes": 4, "sha256": "0" * 64}}
    write_json_atomically(folder / "manifest.json", {"schema_version": 2, "step": step, "files": files})


def test_attempts_that_begin_at_the_same_step_are_counted(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for number in range(3):
        ledger = begin(run)
        assert ledger.earlier_without_progress().count == number
        ledger.end("FAILED", 12, f"fault {number}")
    assert begin(run).earlier_without_progress().last_reason == "fault 2"


def test_a_checkpoint_ends_the_row(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    begin(run)
    begin(run)
    save_checkpoint(run, 4)
    ledger = begin(run)
    assert (ledger.from_step, ledger.earlier_without_progress().count) == (4, 0)
    assert begin(run).earlier_without_progress().count == 1


@pytest.mark.parametrize(("step_time_s", "count"), [(0.5, 2), (30.0, 0), (None, 0)])
def test_a_step_or_two_of_a_long_attempt_are_no_progress(tmp_path: Path, step_time_s: float | None, count: int) -> None:
    """Two attempts of ten minutes, one step each: a second, or half a minute and more, of them was training."""
    run, now = RunDir(tmp_path), time.time()
    for attempt in (1, 2):
        begin(run).end("STOPPED", 13, "SIGUSR1")
        value = read_json(run.attempt_json(attempt)) | {"started_at": now - 600, "ended_at": now}
        write_json_atomically(run.attempt_json(attempt), value)
        append_event(run, TrainEvent(attempt=attempt, step=2 * attempt, step_time_s=step_time_s))
        save_checkpoint(run, 2 * attempt)
    earlier = begin(run).earlier_without_progress()
    assert (earlier.count, earlier.from_step) == (count, 0 if count else 4)


def test_a_requeue_of_a_completed_job_has_nothing_left_to_do(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert completed_attempt(run, "7") is None
    begin(run).end("FAILED", 12, "fault")
    assert completed_attempt(run, "7") is None
    begin(run).end("COMPLETED", 0, None)
    assert completed_attempt(run, "7") == 2
    # A new submission of the run is asked to do more.
    assert completed_attempt(run, "8") is None
    begin(run)
    assert completed_attempt(run, "7") is None


def test_a_new_submission_ends_the_row(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    begin(run, job_id="7")
    assert begin(run, job_id="8").earlier_without_progress().count == 0


def test_another_bundle_ends_the_row(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    begin(run)
    begin(run)
    assert begin(run, bundle=2).earlier_without_progress().count == 0
    assert begin(run, bundle=2).earlier_without_progress().count == 1


def test_an_attempt_without_a_record_ends_the_row(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    begin(run)
    run.begin_attempt()
    assert begin(run).earlier_without_progress().count == 0


def test_the_record_shows_how_the_attempt_ended(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    begin(run).end("STOPPED", 13, "SIGUSR1")
    value = read_json(run.attempt_json(1))
    assert (value["state"], value["exit_code"], value["reason"], value["from_step"]) == ("STOPPED", 13, "SIGUSR1", 0)
    assert value["ended_at"] >= value["started_at"]


HOLD = (
    "import sys, time; from pathlib import Path; from janus_cluster.node.lock import run_folder_held;"
    "from janus_cluster.run.paths import RunDir\n"
    "with run_folder_held(RunDir(Path(sys.argv[1])), job_id='41', wait_s=0):\n"
    "    print('held', flush=True); time.sleep(60)"
)


def test_a_second_attempt_is_refused_with_the_holders_name(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        try:
            with (
                pytest.raises(UsageError, match=rf"job 41 on .*process {holder.pid}") as caught,
                run_folder_held(RunDir(tmp_path), job_id="42", wait_s=0),
            ):
                pass
            assert "janus-cluster submit" in str(caught.value.hint)
        finally:
            holder.kill()
    # The lock goes with its process, however that ended.
    begun = time.monotonic()
    with run_folder_held(RunDir(tmp_path), job_id="42", wait_s=30):
        assert time.monotonic() - begun < 10
        assert "job 42" in RunDir(tmp_path).attempt_lock.read_text()


def test_a_requeued_job_is_not_kept_out_by_the_lock_of_the_node_that_it_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        try:
            # As reported by a file server that keeps the locks of a dead node.
            run.attempt_lock.write_text("job 41 on h800-99, process 7")
            with run_folder_held(run, job_id="41", wait_s=0):
                assert "is still held by job 41 on h800-99" in capsys.readouterr().out
            run.attempt_lock.write_text("job 41 on h800-99, process 7")
            with (
                pytest.raises(UsageError) as caught,
                run_folder_held(run, job_id="4", wait_s=0),
            ):
                pass
            assert f"rm {run.attempt_lock}" in str(caught.value.hint)
        finally:
            holder.kill()
