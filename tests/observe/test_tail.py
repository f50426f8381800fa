"""tail against real writers: a process of its own that appends, truncates, tears characters and comes late."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from janus_cluster.errors import JobNotFound, UsageError
from janus_cluster.observe import tail as tail_module
from janus_cluster.observe.tail import share_out, tail
from janus_cluster.rundir import RunDir, write_json_atomically

# A job as the attempt would write it: two nodes, one of them late; half a character; a log cut short; a final word.
WRITER = r"""
import json, os, sys, time
run = sys.argv[1]
logs = os.path.join(run, "logs", "attempt_1")
def put(name, data, mode="ab"):
    with open(os.path.join(logs, name), mode) as f:
        f.write(data)
put("h800-01.log", b"first node says one\n")
time.sleep(0.3)
put("h800-02.log", b"second node came late\n")
bar = "\u2588".encode()
put("h800-01.rank0.log", b"progress " + bar[:1])
time.sleep(0.3)
put("h800-01.rank0.log", bar[1:] + b" whole\n\xff\xfebinary\n")
put("h800-02.log", b"cut\n", "wb")
time.sleep(0.3)
put("h800-02.log", b"last words without an end")
status = {"cluster": "local", "job_id": "local-%d" % os.getpid(), "attempt": 1, "nodes": ["h800-01", "h800-02"],
          "state": "FAILED", "exit_code": 12, "reason": "training ended", "started_at": time.time(),
          "updated_at": time.time()}
with open(os.path.join(run, ".status"), "w") as f:
    json.dump(status, f)
os.replace(os.path.join(run, ".status"), os.path.join(run, "status.json"))
time.sleep(0.2)
put("h800-01.log", b"after the final word\n")
"""


def make_run(folder: Path, *, attempts: int = 1) -> RunDir:
    run = RunDir(folder / "demo-1")
    run.path.mkdir(parents=True)
    for _ in range(attempts):
        run.begin_attempt()
    return run


def submit_as(run: RunDir, pid: int) -> None:
    sent = {"schema_version": 1, "cluster": "local", "job_id": f"local-{pid}", "submitted_at": time.time() - 1}
    write_json_atomically(run.submission_json, sent)


def end_as(run: RunDir, state: str, exit_code: int | None, **changes: Any) -> None:
    value = {"cluster": "local", "job_id": "local-999999999", "attempt": 1, "nodes": ["h800-01"], "state": state}
    times = {"started_at": time.time(), "updated_at": time.time()}
    write_json_atomically(run.status_json, value | times | {"exit_code": exit_code} | changes)


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A job that lives until the test ends, its command line naming the run folder."""
    argv = [sys.executable, "-c", "import time; time.sleep(600)", str(tmp_path / "demo-1")]
    process = subprocess.Popen(argv, start_new_session=True)
    yield process
    process.kill()
    process.wait()


def test_growing_late_torn_and_truncated_logs_are_followed_to_the_jobs_end(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(run.path)])
    submit_as(run, writer.pid)
    out = io.StringIO()
    try:
        code = tail(run, out=out, poll_s=0.05, state_poll_s=15)
    finally:
        assert writer.wait(timeout=10) == 0
    lines = out.getvalue().splitlines()
    assert code == 12
    for line in [
        "h800-01 | first node says one",
        "h800-02 | second node came late",
        "h800-01:0 | \ufffd\ufffdbinary",
        "h800-02 | cut",
        "h800-02 | last words without an end",
    ]:
        assert lines.count(line) == 1, (line, lines)
    assert any(line.startswith("h800-01:0 | ") and line.endswith("█ whole") for line in lines)
    assert any("cut short" in line for line in lines)
    assert lines[-1] == "── FAILED (exit code 12, says status.json): training ended ──"


def test_completed_job_gives_zero_and_its_last_lines_of_both_nodes(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    submit_as(run, 999_999_999)
    for node in ("h800-01", "h800-02"):
        run.node_log(1, node).write_text("".join(f"{node} line {i}\n" for i in range(100)))
    end_as(run, "COMPLETED", 0)
    out = io.StringIO()
    assert tail(run, out=out, num_lines=4, poll_s=0.01) == 0
    assert out.getvalue().splitlines()[:-1] == [
        "h800-01 | h800-01 line 98",
        "h800-01 | h800-01 line 99",
        "h800-02 | h800-02 line 98",
        "h800-02 | h800-02 line 99",
    ]


def test_job_that_dies_without_a_word_is_no_success(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    submit_as(run, 999_999_999)
    end_as(run, "RUNNING", None)
    out = io.StringIO()
    assert tail(run, out=out, poll_s=0.01) == 1
    assert "ended without saying why" in out.getvalue()


def test_end_that_nobody_knows_is_no_success_after_a_grace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for name in ("squeue", "scontrol", "sacct"):
        (bin_dir / name).write_text(f"#!{sys.executable}\nimport sys\nsys.exit('Invalid job id specified')\n")
        (bin_dir / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(bin_dir))
    monkeypatch.setattr(tail_module, "UNKNOWN_GRACE_S", 0.2)
    run = make_run(tmp_path)
    write_json_atomically(run.submission_json, {"cluster": "slurm", "job_id": "7", "submitted_at": time.time()})
    out = io.StringIO()
    assert tail(run, out=out, poll_s=0.05, state_poll_s=0.1) == 1
    assert "UNKNOWN" in out.getvalue()


def test_pending_is_told_once_per_change_and_slurm_is_asked_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    run = make_run(tmp_path)
    calls, reason = tmp_path / "calls", tmp_path / "reason"
    reason.write_text("Priority")
    (bin_dir / "squeue").write_text(
        f"#!{sys.executable}\nimport time\nopen({str(calls)!r}, 'a').write('x')\nr = open({str(reason)!r}).read()\n"
        f"print('\\x1f'.join(['7', 'PENDING', '0', '0', '', 'N/A', '%d' % time.time(), r, "
        f"{str(run.job_sbatch)!r}, 'demo', '']))\n"
    )
    (bin_dir / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(bin_dir))
    write_json_atomically(run.submission_json, {"cluster": "slurm", "job_id": "7", "submitted_at": time.time()})

    def let_it_run() -> None:
        time.sleep(1.2)
        reason.write_text("Resources")
        time.sleep(1.0)
        end_as(run, "COMPLETED", 0, cluster="slurm", job_id="7")

    thread = threading.Thread(target=let_it_run)
    thread.start()
    out = io.StringIO()
    began = time.monotonic()
    code = tail(run, out=out, poll_s=0.02, state_poll_s=0.5)
    thread.join()
    assert code == 0
    assert out.getvalue().count("── PENDING: Priority ──") == 1
    assert out.getvalue().count("── PENDING: Resources ──") == 1
    assert len(calls.read_text()) <= (time.monotonic() - began) / 0.5 + 1


def test_final_word_of_the_attempt_before_a_requeue_is_not_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    run = make_run(tmp_path, attempts=1)
    row = ["7", "PENDING", "0", "1", "", "N/A", f"{time.time():.0f}", "BeginTime", str(run.job_sbatch), "demo", ""]
    (bin_dir / "squeue").write_text(f"#!{sys.executable}\nprint({chr(31).join(row)!r})\n")
    (bin_dir / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(bin_dir))
    write_json_atomically(run.submission_json, {"cluster": "slurm", "job_id": "7", "submitted_at": time.time() - 9})
    run.node_log(1, "h800-01").write_text("of attempt one\n")
    end_as(run, "CANCELLED", 13, cluster="slurm", job_id="7")

    def begin_again() -> None:
        time.sleep(0.4)
        run.begin_attempt()
        run.node_log(2, "h800-01").write_text("of attempt two\n")
        time.sleep(0.3)
        end_as(run, "COMPLETED", 0, cluster="slurm", job_id="7", attempt=2)

    thread = threading.Thread(target=begin_again)
    thread.start()
    out = io.StringIO()
    code = tail(run, out=out, poll_s=0.02)
    thread.join()
    lines = out.getvalue().splitlines()
    assert code == 0
    assert lines.index("h800-01 | of attempt one") < lines.index("── attempt 2 ──")
    assert lines[lines.index("── attempt 2 ──") + 1] == "h800-01 | of attempt two"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rank": 3}, ["h800-02:3 | three NCCL"]),
        ({"node": "h800-01"}, ["h800-01 | agent", "h800-01:0 | zero"]),
        ({"grep": "NCCL|agent"}, ["h800-01 | agent", "h800-02:3 | three NCCL"]),
        ({"node": "h800-01", "rank": 0}, ["h800-01:0 | zero"]),
        ({"node": "no-such"}, []),
    ],
)
def test_view_is_narrowed_by_rank_node_and_expression(
    tmp_path: Path, options: dict[str, Any], expected: list[str]
) -> None:
    run = make_run(tmp_path)
    submit_as(run, 999_999_999)
    run.batch_log.write_text("batch\n")
    run.node_log(1, "h800-01").write_text("agent\n")
    run.rank_log(1, "h800-01", 0).write_text("zero\n")
    run.rank_log(1, "h800-02", 3).write_text("three NCCL\n")
    end_as(run, "COMPLETED", 0)
    out = io.StringIO()
    assert tail(run, out=out, follow=False, **options) == 0
    assert out.getvalue().splitlines()[:-1] == expected


def test_no_follow_of_a_running_job_returns_at_once(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    run = make_run(tmp_path)
    submit_as(run, sleeper.pid)
    run.node_log(1, "h800-01").write_text("whole\nhalf")
    out = io.StringIO()
    assert tail(run, out=out, follow=False) == 0
    assert "h800-01 | whole\n" in out.getvalue()
    assert "h800-01 | half\n" in out.getvalue()


def test_bad_expression_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--grep"):
        tail(make_run(tmp_path), out=io.StringIO(), grep="(")


def test_run_that_was_never_submitted_cannot_be_followed(tmp_path: Path) -> None:
    with pytest.raises(JobNotFound, match="was not submitted"):
        tail(make_run(tmp_path), out=io.StringIO())


def test_ctrl_c_leaves_the_job_alone(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    run = make_run(tmp_path)
    submit_as(run, sleeper.pid)
    run.node_log(1, "h800-01").write_text("here\n")
    code = (
        "import sys; from pathlib import Path; from janus_cluster.rundir import RunDir; "
        "from janus_cluster.observe.tail import tail; sys.exit(tail(RunDir(Path(sys.argv[1])), out=sys.stdout))"
    )
    watcher = subprocess.Popen([sys.executable, "-c", code, str(run.path) + "/."], stdout=subprocess.PIPE, text=True)
    assert watcher.stdout is not None
    assert watcher.stdout.readline() == "h800-01 | here\n"
    watcher.send_signal(signal.SIGINT)
    rest, _ = watcher.communicate(timeout=10)
    assert watcher.returncode == 130
    assert "the job goes on" in rest
    assert sleeper.poll() is None


def test_reader_that_goes_away_ends_tail_quietly(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    run = make_run(tmp_path)
    submit_as(run, sleeper.pid)
    run.node_log(1, "h800-01").write_text("line\n" * 100_000)
    argv = [sys.executable, "-c", "from janus_cluster.observe.cli import tail; tail()", str(run.path), "-n", "100000"]
    watcher = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert watcher.stdout is not None and watcher.stderr is not None
    watcher.stdout.readline()
    watcher.stdout.close()
    assert watcher.wait(timeout=10) == 141
    assert watcher.stderr.read() == b""
    watcher.stderr.close()


def test_terminal_gets_colours_and_a_pipe_none(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    submit_as(run, 999_999_999)
    run.node_log(1, "h800-01").write_text("here\n")
    end_as(run, "COMPLETED", 0)
    parent, child = os.openpty()
    with os.fdopen(child, "w") as terminal:
        tail(run, out=terminal, follow=False)
        shown = os.read(parent, 10_000).decode()
    os.close(parent)
    assert re.search(r"\x1b\[\d+mh800-01 \|\x1b\[0m here", shown)
    pipe = io.StringIO()
    tail(run, out=pipe, follow=False)
    assert "\x1b" not in pipe.getvalue()


@pytest.mark.parametrize(
    ("asked", "budget", "shares"),
    [
        ([5, 5], 4, [2, 2]),
        ([1, 9], 6, [1, 5]),
        ([3, 3], 20, [3, 3]),
        ([2, 2, 2], 2, [0, 1, 1]),
        ([], 5, []),
        ([4], 0, [0]),
    ],
)
def test_lines_are_shared_out_evenly(asked: list[int], budget: int, shares: list[int]) -> None:
    assert share_out(asked, budget) == shares
