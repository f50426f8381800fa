"""The rules of the state, one claim each: the job's own record, Slurm's answer, and the result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from janus_cluster.run.files import write_json_atomically
from janus_cluster.run.local_process import is_local_job
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.failure import ScriptFailure
from janus_cluster.run.records.submission import StatusRecord, Submission, load_status, load_submission
from janus_cluster.slurm.commands import SlurmJob
from janus_cluster.slurm.state import (
    Answer,
    JobState,
    is_same_job,
    judge_local_state,
    judge_slurm_state,
    load_job_states,
)

NOW = 1_795_234_000.0


def a_status(state: str = "RUNNING", **changes: Any) -> StatusRecord:
    value: dict[str, Any] = {
        "cluster": "slurm",
        "job_id": "12",
        "attempt": 1,
        "nodes": ("h800-01", "h800-02"),
        "started_at": NOW - 100,
        "updated_at": NOW - 10,
    }
    return StatusRecord(state=state, **(value | changes))


def a_job(state: str, **changes: Any) -> SlurmJob:
    value: dict[str, Any] = {"job_id": "12", "source": "squeue", "nodes": ("h800-01",), "start_time": NOW - 101}
    return SlurmJob(state=state, **(value | changes))


def judge(status: StatusRecord | None, job: SlurmJob | None, problem: str | None = None) -> JobState:
    return judge_slurm_state(status, Answer(job=job, problem=problem), now=NOW)


def test_running_status_is_believed_while_slurm_agrees() -> None:
    state = judge(a_status(), a_job("RUNNING"))
    assert (state.state, state.source, state.age_s, state.attempt) == ("RUNNING", "status.json", 10.0, 1)
    assert state.nodes == ("h800-01", "h800-02")


@pytest.mark.parametrize(
    "word",
    ["NODE_FAIL", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "PREEMPTED", "DEADLINE", "BOOT_FAIL", "FAILED"],
)
def test_running_status_is_not_believed_against_a_dead_job(word: str) -> None:
    state = judge(a_status(), a_job(word))
    assert (state.state, state.source) == (word, "squeue")
    assert state.is_final
    assert state.command_exit_code != 0
    assert state.reason


def test_running_status_of_a_forgotten_job_is_failed_once_its_heartbeat_is_old() -> None:
    state = judge(a_status(updated_at=NOW - 10), None)
    assert (state.state, state.source) == ("RUNNING", "status.json")
    assert "not confirmed" in (state.reason or "")
    state = judge(a_status(updated_at=NOW - 60), None)
    assert (state.state, state.source) == ("FAILED", "squeue")
    assert "no longer knows" in (state.reason or "")
    assert state.command_exit_code == 1


def test_running_status_is_kept_unconfirmed_when_slurm_cannot_be_asked() -> None:
    state = judge(a_status(), None, problem="Slurm does not answer")
    assert (state.state, state.reason) == ("RUNNING", "not confirmed: Slurm does not answer")


def test_a_state_without_a_source_is_unknown_and_no_success() -> None:
    for state in (judge(None, None), judge(None, None, problem="no squeue")):
        assert state.state == "UNKNOWN"
        assert not state.is_final
        assert state.command_exit_code == 1


def test_word_that_this_version_does_not_know_is_unknown() -> None:
    state = judge(a_status(), a_job("TELEPORTED"))
    assert (state.state, state.command_exit_code) == ("UNKNOWN", 1)
    assert "TELEPORTED" in (state.reason or "")


def test_completed_in_slurm_with_an_unfinished_status_is_no_success() -> None:
    state = judge(a_status(), a_job("COMPLETED", exit_code=0))
    assert (state.state, state.command_exit_code) == ("UNKNOWN", 1)


def test_completed_status_is_success_whatever_slurm_remembers() -> None:
    for job in (None, a_job("COMPLETED"), a_job("COMPLETING"), a_job("RUNNING")):
        state = judge(a_status("COMPLETED", exit_code=0), job)
        assert (state.state, state.source, state.command_exit_code) == ("COMPLETED", "status.json", 0)


def test_failed_status_keeps_its_own_exit_code_and_reason() -> None:
    status = a_status("FAILED", exit_code=10, reason="preflight FAIL: h800-02 paths.model")
    state = judge(status, a_job("FAILED", exit_code=1))
    assert (state.exit_code, state.command_exit_code, state.source) == (10, 10, "status.json")
    assert state.reason == "preflight FAIL: h800-02 paths.model"


@pytest.mark.parametrize(
    "word", ["PENDING", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING", "POWER_UP_NODE", "EXPEDITING", "SPECIAL_EXIT"]
)
@pytest.mark.parametrize("last", ["STOPPED", "CANCELLED", "FAILED", "RUNNING"])
def test_requeued_job_is_waiting_for_any_last_record_of_its_attempt(word: str, last: str) -> None:
    state = judge(a_status(last), a_job(word, reason="BeginTime", nodes=()))
    assert (state.state, state.reason, state.attempt) == (word, "BeginTime", 1)
    assert not state.is_final


def test_job_that_started_after_the_last_word_runs_again() -> None:
    state = judge(a_status("STOPPED"), a_job("RUNNING", start_time=NOW - 5, nodes=("h800-07",)))
    assert (state.state, state.source, state.nodes) == ("RUNNING", "squeue", ("h800-07",))


def test_stopped_job_that_slurm_has_not_let_go_may_still_come_back() -> None:
    for last in ("STOPPED", "CANCELLED"):
        assert not judge(a_status(last), a_job("COMPLETING")).is_final
        assert not judge(a_status(last), a_job("RUNNING")).is_final
        assert judge(a_status(last), a_job("CANCELLED")).is_final


@pytest.mark.parametrize("word", ["COMPLETING", "SUSPENDED", "RESIZING", "SIGNALING"])
def test_between_states_are_shown_and_are_no_end(word: str) -> None:
    state = judge(a_status(), a_job(word))
    assert state.state == word
    assert not state.is_final


def test_slurms_stopped_is_suspended_and_not_our_stopped() -> None:
    state = judge(a_status(), a_job("STOPPED"))
    assert state.state == "SUSPENDED"
    assert not state.is_final


def test_cancelled_in_the_queue_forgets_why_it_waited() -> None:
    state = judge(None, a_job("CANCELLED", exit_code=0, reason="Resources"))
    assert (state.reason, state.command_exit_code) == ("cancelled", 1)


def test_signal_that_ended_the_script_gives_the_shells_exit_code() -> None:
    assert judge(None, a_job("FAILED", exit_code=0, signal=9)).exit_code == 137
    assert judge(a_status("CANCELLED", signal=15), None).command_exit_code == 143


def test_bookkeeping_signals_of_slurm_are_no_exit_codes() -> None:
    assert judge(None, a_job("DEADLINE", exit_code=0, signal=1)).exit_code is None
    assert judge(None, a_job("OUT_OF_MEMORY", exit_code=0, signal=125)).exit_code is None


def test_stopped_on_purpose_has_its_own_exit_code() -> None:
    assert judge(a_status("STOPPED"), None).command_exit_code == 13


def test_same_number_of_a_newer_slurm_is_another_job(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "demo-1")
    sent = Submission(cluster="sandbox", job_id="2", submitted_at=NOW)
    for script in (run.bundle(1).job_sbatch, run.bundle(12).job_sbatch, run.links.job_sbatch):
        ours = a_job("RUNNING", submit_time=NOW + 1, restarts=0, command=f"{script} x")
        assert is_same_job(ours, run, sent)
    assert is_same_job(a_job("RUNNING", submit_time=NOW + 9000, restarts=1), run, sent)
    assert not is_same_job(a_job("RUNNING", submit_time=NOW + 9000, restarts=0), run, sent)
    assert not is_same_job(a_job("RUNNING", submit_time=NOW - 9000, restarts=1), run, sent)
    for other in ("demo-2/job.sbatch", "demo-10/bundles/1/job.sbatch"):
        assert not is_same_job(a_job("RUNNING", command=f"{tmp_path}/{other}"), run, sent)


def test_local_process_without_a_final_word_has_failed() -> None:
    state = judge_local_state(a_status(cluster="local"), alive=False, now=NOW)
    assert (state.state, state.source, state.command_exit_code) == ("FAILED", "process", 1)
    assert "ended without a reason" in (state.reason or "")
    assert judge_local_state(None, alive=False, now=NOW).state == "FAILED"
    assert judge_local_state(None, alive=True, now=NOW).state == "RUNNING"
    assert judge_local_state(a_status("COMPLETED", exit_code=0), alive=False, now=NOW).command_exit_code == 0


def make_run(folder: Path, *, submission: dict[str, Any] | None = None, status: dict[str, Any] | None = None) -> RunDir:
    run = RunDir(folder)
    run.logs.mkdir(parents=True)
    if submission is not None:
        write_json_atomically(run.submission_json, {"schema_version": 1, "submitted_at": time.time()} | submission)
    if status is not None:
        times = {"started_at": time.time(), "updated_at": time.time()}
        write_json_atomically(run.status_json, {"schema_version": 1, "attempt": 1} | times | status)
    return run


def test_dry_run_is_not_submitted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    state = load_job_states([run])[0]
    assert (state.state, state.source) == ("NOT_SUBMITTED", "run folder")
    assert str(run.links.job_sbatch) in (state.reason or "")


def test_script_submitted_by_hand_is_known_by_its_status(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", status={"cluster": "slurm", "job_id": "31", "state": "COMPLETED", "exit_code": 0})
    sent = load_submission(run)
    assert sent is not None
    assert (sent.cluster, sent.job_id) == ("slurm", "31")


def test_later_submission_by_hand_wins_over_submission_json(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "r",
        submission={"cluster": "slurm", "job_id": "7", "submitted_at": time.time() - 500},
        status={"cluster": "slurm", "job_id": "31", "state": "RUNNING"},
    )
    sent = load_submission(run)
    assert sent is not None
    assert sent.job_id == "31"


def test_status_of_an_earlier_job_is_not_that_of_the_new_one(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "r",
        submission={"cluster": "slurm", "job_id": "8", "submitted_at": time.time()},
        status={"cluster": "slurm", "job_id": "7", "state": "COMPLETED", "started_at": time.time() - 900},
    )
    sent = load_submission(run)
    assert sent is not None
    assert sent.job_id == "8"
    assert load_job_states([run])[0].state != "COMPLETED"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": 3}', '{"state": "RUNNING", "nodes": 5, "attempt": "x"}'])
def test_damaged_status_file_is_survived(tmp_path: Path, text: str) -> None:
    run = make_run(tmp_path / "r")
    run.status_json.write_text(text)
    status = load_status(run)
    assert status is None or (status.nodes == () and status.attempt is None)


@pytest.fixture
def local_job(tmp_path: Path) -> Iterator[tuple[RunDir, subprocess.Popen[bytes]]]:
    """A run whose job is a real process in a session of its own, its command line naming the run's script."""
    run = make_run(tmp_path / "a run")
    run.bundle(1).path.mkdir(parents=True)
    run.bundle(1).job_sbatch.write_text("while :; do sleep 0.1; done\n")
    process = subprocess.Popen(["bash", str(run.bundle(1).job_sbatch)], start_new_session=True)
    write_json_atomically(
        run.submission_json,
        {
            "schema_version": 1,
            "cluster": "local",
            "job_id": f"local-{process.pid}",
            "submitted_at": time.time(),
            "command": ["bash", str(run.bundle(1).job_sbatch)],
        },
    )
    yield run, process
    if process.poll() is None:
        process.kill()
    process.wait()


def test_live_local_process_is_running(local_job: tuple[RunDir, subprocess.Popen[bytes]]) -> None:
    run, process = local_job
    assert is_local_job(process.pid, run)
    assert (load_job_states([run])[0].state, load_job_states([run])[0].source) == ("RUNNING", "process")


def test_a_live_local_process_is_that_of_its_run_after_the_folder_was_moved(
    local_job: tuple[RunDir, subprocess.Popen[bytes]],
) -> None:
    run, _ = local_job
    moved = RunDir(run.path.rename(run.path.with_name("moved")))
    assert load_job_states([moved])[0].state == "RUNNING"


def test_a_process_that_becomes_one_program_after_the_other_is_alive_all_the_time(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    run.bundle(1).path.mkdir(parents=True)
    run.bundle(1).job_sbatch.write_text('exec bash "$0"\n')
    process = subprocess.Popen(["bash", str(run.bundle(1).job_sbatch)], start_new_session=True)
    try:
        assert [is_local_job(process.pid, run) for _ in range(500)] == [True] * 500
    finally:
        process.kill()
        process.wait()


def test_killed_local_process_has_failed_even_as_a_zombie(local_job: tuple[RunDir, subprocess.Popen[bytes]]) -> None:
    run, process = local_job
    write_json_atomically(
        run.status_json, {"cluster": "local", "job_id": f"local-{process.pid}", "state": "RUNNING", "attempt": 1}
    )
    assert load_job_states([run])[0].state == "RUNNING"
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert load_job_states([run])[0].state == "FAILED"


def test_process_that_has_our_old_pid_is_not_ours(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", submission={"cluster": "local", "job_id": f"local-{os.getpid()}"})
    assert not is_local_job(os.getpid(), run)
    assert load_job_states([run])[0].state == "FAILED"


def test_one_squeue_serves_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    rows = "".join(
        f"{i}\x1fPENDING\x1f0\x1f0\x1f\x1fN/A\x1f{time.time():.0f}\x1fResources\x1f{tmp_path}/r{i}/job.sbatch\x1fj\x1f\n"
        for i in range(1, 6)
    )
    calls = tmp_path / "calls"
    (folder / "squeue").write_text(
        f"#!{sys.executable}\nopen({str(calls)!r}, 'a').write('called\\n')\nprint({rows!r}, end='')\n"
    )
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    runs = [make_run(tmp_path / f"r{i}", submission={"cluster": "slurm", "job_id": str(i)}) for i in range(1, 6)]
    states = load_job_states(runs)
    assert [s.state for s in states] == ["PENDING"] * 5
    assert calls.read_text() == "called\n"


def test_accounting_answers_for_a_job_that_the_controller_forgot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    row = f"9\x1fNODE_FAIL\x1f0:0\x1fh800-[01-02]\x1f{time.time():.0f}\x1f{time.time():.0f}\x1fNone\x1fj\n"
    gone = "sys.exit('slurm_load_jobs error: Invalid job id specified')"
    for name, body in {"squeue": gone, "scontrol": gone, "sacct": f"print({row!r}, end='')"}.items():
        (folder / name).write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    run = make_run(
        tmp_path / "r",
        submission={"cluster": "slurm", "job_id": "9"},
        status={"cluster": "slurm", "job_id": "9", "state": "RUNNING", "updated_at": time.time() - 600},
    )
    state = load_job_states([run])[0]
    assert (state.state, state.source) == ("NODE_FAIL", "sacct")
    (folder / "sacct").write_text(f"#!{sys.executable}\nprint({row.replace('NODE_FAIL', 'RUNNING')!r}, end='')\n")
    assert load_job_states([run])[0].state == "FAILED"


def test_completed_runs_are_shown_without_asking_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    run = make_run(
        tmp_path / "r",
        submission={"cluster": "slurm", "job_id": "9"},
        status={"cluster": "slurm", "job_id": "9", "state": "COMPLETED", "exit_code": 0},
    )
    assert load_job_states([run])[0].command_exit_code == 0


def test_folder_resubmitted_after_it_completed_is_not_called_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    run = make_run(
        tmp_path / "r",
        submission={"cluster": "slurm", "job_id": "10"},
        status={"cluster": "slurm", "job_id": "9", "state": "COMPLETED", "exit_code": 0, "started_at": 5.0},
    )
    assert load_job_states([run])[0].state == "UNKNOWN"


def test_status_json_of_the_contract_is_read_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    run.status_json.write_text(
        json.dumps(
            {
                "schema_version": 1,
                "cluster": "slurm",
                "job_id": "12",
                "attempt": 2,
                "state": "FAILED",
                "phase": "preflight",
                "nodes": ["h800-01", "h800-02"],
                "exit_code": 10,
                "signal": None,
                "reason": "preflight FAIL",
                "started_at": 1.0,
                "updated_at": 2.5,
            }
        )
    )
    status = load_status(run)
    assert status == StatusRecord(
        state="FAILED",
        cluster="slurm",
        job_id="12",
        attempt=2,
        phase="preflight",
        nodes=("h800-01", "h800-02"),
        exit_code=10,
        reason="preflight FAIL",
        started_at=1.0,
        updated_at=2.5,
    )


@pytest.mark.parametrize("squeue", ["exit 0", "echo 'slurm_load_jobs error: Unable to contact' >&2; exit 1"])
def test_a_script_that_recorded_its_end_has_failed_whatever_slurm_remembers(
    squeue: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("squeue", "scontrol", "sacct"):
        (tmp_path / name).write_text(f"#!/bin/sh\n{squeue}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    run = RunDir(tmp_path / "run")
    run.logs.mkdir(parents=True)
    write_json_atomically(run.submission_json, {"cluster": "slurm", "job_id": "7", "submitted_at": 1.0})
    assert load_job_states([run])[0].state == "UNKNOWN"
    ScriptFailure(job_id="7", node="n1", message="module: not found").write(run.script_failure_json)
    state = load_job_states([run])[0]
    assert (state.state, state.exit_code, state.reason) == ("FAILED", 2, "module: not found")
    ScriptFailure(job_id="6", node="n1", message="of an earlier job").write(run.script_failure_json)
    assert load_job_states([run])[0].state == "UNKNOWN"
