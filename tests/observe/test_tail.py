"""tail against real writers: a process of its own that appends, truncates, tears characters and comes late."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from run_files import append_metric_line, write_verdict

from janus_cluster.errors import JobCannotStart, JobNotFound, UsageError
from janus_cluster.observe import logfile
from janus_cluster.observe import tail as tail_module
from janus_cluster.observe.tail import tail
from janus_cluster.observe.tail_view import parse_since
from janus_cluster.run.files import write_json_atomically
from janus_cluster.run.paths import RunDir
from janus_cluster.run.stamped import render_stamp

pytestmark = pytest.mark.slow

# A job as the attempt would write it: two nodes, one of them late; half a character; a log cut short; a final word.
WRITER = r"""
import json, os, sys, time
run = sys.argv[1]
logs = os.path.join(run, "logs", "attempt_1")
def put(name, data, mode="ab"):
    with open(os.path.join(logs, name), mode) as f:
        f.write(data)
put("h800-01.log", b"first node prints one\n")
time.sleep(0.3)
put("h800-02.log", b"second node is late\n")
bar = "\u2588".encode()
put("h800-01.rank0.log", b"progress " + bar[:1])
time.sleep(0.5)
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
    run.bundle(1).path.mkdir(parents=True)
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
        assert writer.wait(timeout=600) == 0
    lines = out.getvalue().splitlines()
    assert code == 12
    for line in [
        "h800-01 | first node prints one",
        "h800-02 | second node is late",
        "h800-01:0 | \ufffd\ufffdbinary",
        "h800-02 | cut",
        "h800-02 | last words without an end",
    ]:
        assert lines.count(line) == 1, (line, lines)
    assert any(line.startswith("h800-01:0 | ") and line.endswith("█ whole") for line in lines)
    assert any("cut short" in line for line in lines)
    assert lines[-1] == "── FAILED (exit code 12, source: status.json): training ended ──"


def stamped(seconds: float, text: str) -> str:
    return f"{render_stamp(seconds)} {text}\n"


def test_completed_job_gives_zero_and_its_last_lines_in_the_order_of_their_times(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    submit_as(run, 999_999_999)
    begun = time.time() - 200
    for i, node in enumerate(("h800-01", "h800-02")):
        run.node_log(1, node).write_text("".join(stamped(begun + 2 * n + i, f"{n} of {node}") for n in range(100)))
    end_as(run, "COMPLETED", 0)
    out = io.StringIO()
    assert tail(run, out=out, num_lines=4, poll_s=0.01) == 0
    assert before_the_end(out) == [
        "h800-01 | 98 of h800-01",
        "h800-02 | 98 of h800-02",
        "h800-01 | 99 of h800-01",
        "h800-02 | 99 of h800-02",
    ]


def lines_of(run: RunDir, **options: Any) -> list[str]:
    """The log lines that tail prints of a run that has completed."""
    end_as(run, "COMPLETED", 0)
    out = io.StringIO()
    assert tail(run, out=out, follow=False, **options) == 0
    return before_the_end(out)


def before_the_end(out: io.StringIO) -> list[str]:
    """The lines before the state in which a completed run ended, and what follows it."""
    lines = out.getvalue().splitlines()
    return lines[: lines.index("── COMPLETED (exit code 0, source: status.json) ──")]


def sixteen_ranks(run: RunDir, *texts: str, seconds: float) -> None:
    for rank in range(16):
        output = "".join(stamped(seconds + rank / 100, text.format(rank=rank)) for text in texts)
        run.rank_log(1, f"h800-{1 + rank // 8:02d}", rank).write_text(output)


def test_equal_lines_of_sixteen_ranks_are_one_line_and_raw_shows_all(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    submit_as(run, 999_999_999)
    seconds = time.time() - 60
    sixteen_ranks(run, "Traceback", "rank {rank} only", seconds=seconds)
    shown = lines_of(run, num_lines=17)
    assert shown[0] == "h800-01,02:0-15 | Traceback  ×16"
    assert shown[1] == "h800-01:0 | rank 0 only" and len(shown) == 17
    raw = lines_of(run, num_lines=100, raw=True)
    assert len(raw) == 32 and raw[0] == f"h800-01:0 | {render_stamp(seconds)} Traceback"


def test_logs_of_attempts_long_over_are_not_read_for_the_last_lines(tmp_path: Path) -> None:
    run = make_run(tmp_path, attempts=3)
    submit_as(run, 999_999_999)
    now = time.time() - 100
    run.batch_log.write_text("".join(stamped(now - 300 + 100 * n, f"attempt {n} of demo-1: job 7") for n in (1, 2, 3)))
    for attempt in (1, 2, 3):
        text = "".join(stamped(now - 299 + 100 * attempt + i, f"line {i}") for i in range(50))
        run.rank_log(attempt, "h800-01", 0).write_text(text)
    with run.rank_log(1, "h800-01", 0).open("a") as f:
        f.write(stamped(now + 60, "would be the last of all if it were read"))
    shown = lines_of(run, num_lines=53)
    assert shown[:4] == ["── attempt 2 ──", "h800-01:0 | line 48", "h800-01:0 | line 49", "── attempt 3 ──"]
    assert shown[4] == "batch | attempt 3 of demo-1: job 7" and shown[-1] == "h800-01:0 | line 49"
    assert lines_of(run, num_lines=120)[-1].endswith("if it were read")


NOISE = (
    "Loading shards:  25%|██▌       | 1/4 [00:01<00:05,  1.90s/it]\n"
    "[2026-11-21 14:01:43,623] [INFO] [config.py:1001:print]   loss_scale ... 1\n"
    "step 3/20 loss 8.372 action 1.286 lr 1.0e-03 step_time_s 0.47\n"
    "to be read\n"
)


def test_noise_is_left_out_of_a_pipe_unless_it_is_asked_for(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    submit_as(run, 999_999_999)
    run.rank_log(1, "h800-01", 0).write_text(NOISE)
    bar, chatter, step, rest = (f"h800-01:0 | {line}" for line in NOISE.splitlines())
    assert lines_of(run) == [step, rest]
    assert lines_of(run, grep="loss") == [chatter, step]
    assert lines_of(run, grep="Loading|read") == [rest], "a bar is no line, for any text in it"
    assert lines_of(run, raw=True) == [bar, chatter, step, rest]
    assert lines_of(run, num_lines=1) == [rest]


def test_noise_that_was_left_out_is_counted_at_the_end(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    submit_as(run, 999_999_999)
    run.rank_log(1, "h800-01", 0).write_text(NOISE)
    shown = lines_of(run, since="1h")
    assert shown[-1] == "── 1 lines of DeepSpeed's and NCCL's INFO were left out; --raw shows them ──"


def test_a_request_for_more_than_is_searched_is_answered_with_a_note(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    submit_as(run, 999_999_999)
    log = run.node_log(1, "h800-01")
    hay = "hay" * 1000
    log.write_text(stamped(5, "needle") + f"{hay}\n" * (logfile.MAX_BACK_BYTES // len(hay)))
    reported = "── fewer than 2 lines are in the last 4 MB of each log; --since 1d looks further back ──"
    assert lines_of(run, num_lines=2, grep="needle") == [reported]
    assert lines_of(run, num_lines=2) == [f"h800-01 | {hay}"] * 2
    log.write_text(stamped(5, "needle") + "hay\n" * 10)
    assert lines_of(run, num_lines=2, grep="needle") == ["h800-01 | needle"], "a whole log was looked through"


def test_lines_since_a_time_come_from_all_files(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    submit_as(run, 999_999_999)
    now = time.time()
    for i, node in enumerate(("h800-01", "h800-02")):
        run.node_log(1, node).write_text("".join(stamped(now - 60 * n + i, f"{n} min ago") for n in range(30, 0, -1)))
    shown = lines_of(run, since="150s")
    assert shown == ["h800-01,02 | 2 min ago  ×2", "h800-01,02 | 1 min ago  ×2"]
    assert lines_of(run, since="150s", num_lines=1) == shown[1:]
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now - 70))
    assert lines_of(run, since=moment) == shown[1:]
    assert lines_of(run, since="1s") == []


def test_long_logs_of_two_attempts_are_merged_in_pieces_that_fit_into_memory(tmp_path: Path) -> None:
    run = make_run(tmp_path, attempts=2)
    submit_as(run, 999_999_999)
    begun = time.time() - 4000
    for attempt, node in ((1, "h800-01"), (1, "h800-02"), (2, "h800-01")):
        seconds = [begun + 1500 * attempt + n / 10 for n in range(10_000)]
        with run.node_log(attempt, node).open("w") as f:
            f.writelines(
                stamped(s, f"{node} {s:.1f} {'needle' if n % 100 == 0 else 'hay'}") for n, s in enumerate(seconds)
            )
    shown = [line for line in lines_of(run, since="2h", grep="needle") if not line.startswith("──")]
    assert len(shown) == 300
    times = [float(line.split()[-2]) for line in shown]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10m", "2026-11-21T13:51:43+00:00"),
        ("2h", "2026-11-21T12:01:43+00:00"),
        ("1.5d", "2026-11-20T02:01:43+00:00"),
        ("90s", "2026-11-21T14:00:13+00:00"),
        ("14:00", "2026-11-21T14:00:00+00:00"),
        ("14:02", "2026-11-20T14:02:00+00:00"),
        ("9:05:30", "2026-11-21T09:05:30+00:00"),
        ("2026-11-21T03:00", "2026-11-21T03:00:00+00:00"),
        ("2026-11-21T03:00:00+08:00", "2026-11-20T19:00:00+00:00"),
        ("2026-11-21", "2026-11-21T00:00:00+00:00"),
    ],
)
def test_a_time_is_read_in_the_ways_people_write_it(text: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    try:
        assert parse_since(text, now=1795269703.0) == datetime.fromisoformat(expected).timestamp()
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("text", ["", "yesterday", "10", "25:00", "10 m", "-5m", "2026-13-01"])
def test_what_is_no_time_is_a_usage_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="--since"):
        tail(make_run(tmp_path), out=io.StringIO(), since=text)


def test_job_that_dies_without_a_word_is_no_success(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    submit_as(run, 999_999_999)
    end_as(run, "RUNNING", None)
    out = io.StringIO()
    assert tail(run, out=out, poll_s=0.01) == 1
    assert "ended without a reason" in out.getvalue()


def test_an_unknown_end_is_no_success_after_a_grace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.fixture
def waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], RunDir]:
    """A run whose job waits in the queue for the reason that is given; the grace is short."""

    def make(reason: str) -> RunDir:
        bin_dir, run = tmp_path / "bin", make_run(tmp_path)
        bin_dir.mkdir()
        script = str(run.bundle(1).job_sbatch)
        fields = ["7", "PENDING", "0", "0", "", "N/A", f"{time.time():.0f}", reason, script, "demo", ""]
        (bin_dir / "squeue").write_text(f"#!{sys.executable}\nprint({chr(31).join(fields)!r})\n")
        (bin_dir / "squeue").chmod(0o755)
        monkeypatch.setenv("PATH", str(bin_dir))
        monkeypatch.setattr(tail_module, "CANNOT_START_GRACE_S", 0.3)
        monkeypatch.setattr(tail_module, "FOR_USER_ALONE_GRACE_S", 0.3)
        write_json_atomically(run.submission_json, {"cluster": "slurm", "job_id": "7", "submitted_at": time.time()})
        return run

    return make


@pytest.mark.parametrize(
    ("reason", "command"),
    [("DependencyNeverSatisfied", "scancel 7"), ("JobHeldUser", "release 7"), ("PartitionDown", "sinfo -R")],
)
def test_a_job_that_cannot_start_is_not_followed_without_an_end(
    waiting: Callable[[str], RunDir], reason: str, command: str
) -> None:
    with pytest.raises(JobCannotStart, match=f"job 7 is queued and cannot start: {reason}") as e:
        tail(waiting(reason), out=io.StringIO(), poll_s=0.05, state_poll_s=0.1)
    assert e.value.exit_code == 24
    assert command in str(e.value.hint)


@pytest.mark.parametrize("reason", ["Priority", "QOSGrpCpuLimit"])
def test_a_job_that_only_waits_is_followed_to_its_end(waiting: Callable[[str], RunDir], reason: str) -> None:
    run = waiting(reason)
    end = threading.Timer(2, lambda: end_as(run, "COMPLETED", 0, cluster="slurm", job_id="7"))
    end.start()
    assert tail(run, out=io.StringIO(), poll_s=0.05, state_poll_s=0.1) == 0
    end.join()


def test_pending_is_reported_once_per_change_and_slurm_is_asked_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    run = make_run(tmp_path)
    calls, reason, start = tmp_path / "calls", tmp_path / "reason", tmp_path / "start"
    reason.write_text("Priority")
    start.write_text("N/A")
    (bin_dir / "squeue").write_text(
        f"#!{sys.executable}\nimport time\nopen({str(calls)!r}, 'a').write('x')\nr = open({str(reason)!r}).read()\n"
        f"s = open({str(start)!r}).read()\n"
        f"print('\\x1f'.join(['7', 'PENDING', '0', '0', '', s, '%d' % time.time(), r, "
        f"{str(run.bundle(1).job_sbatch)!r}, 'demo', '']))\n"
    )
    (bin_dir / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(bin_dir))
    write_json_atomically(run.submission_json, {"cluster": "slurm", "job_id": "7", "submitted_at": time.time()})

    def let_tail_ask() -> None:
        # The first may have begun before; what the second brings is shown before the third.
        most, until = len(calls.read_text()) + 3, time.monotonic() + 30
        while len(calls.read_text()) < most and time.monotonic() < until:
            time.sleep(0.02)

    def let_it_run() -> None:
        calls.touch()
        let_tail_ask()
        start.write_text(f"{time.time() + 625:.0f}")
        reason.write_text("Resources")
        let_tail_ask()
        end_as(run, "COMPLETED", 0, cluster="slurm", job_id="7")

    thread = threading.Thread(target=let_it_run)
    thread.start()
    out = io.StringIO()
    began = time.monotonic()
    code = tail(run, out=out, poll_s=0.02, state_poll_s=0.25)
    thread.join()
    assert code == 0
    assert out.getvalue().count("── PENDING: Priority ──") == 1
    assert len(re.findall(r"── PENDING: Resources; expected start \d\d:\d\d \(in 10 min\) ──", out.getvalue())) == 1
    assert out.getvalue().count("PENDING") == 2
    assert len(calls.read_text()) <= (time.monotonic() - began) / 0.25 + 1


def test_final_word_of_the_attempt_before_a_requeue_is_not_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    run = make_run(tmp_path, attempts=1)
    row = [
        "7",
        "PENDING",
        "0",
        "1",
        "",
        "N/A",
        f"{time.time():.0f}",
        "BeginTime",
        str(run.bundle(1).job_sbatch),
        "demo",
        "",
    ]
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


@pytest.mark.parametrize(
    ("view", "asked"),
    [
        ({"node": "h800-2"}, "node h800-2"),
        ({"rank": 16}, "rank 16"),
        ({"node": "h800-01", "rank": 1}, "node h800-01, rank 1"),
    ],
)
def test_a_node_or_rank_without_a_log_is_reported_with_those_that_have_one(
    tmp_path: Path, view: dict[str, Any], asked: str
) -> None:
    run = make_run(tmp_path)
    submit_as(run, 999_999_999)
    run.batch_log.write_text("attempt 1 of 1\n")
    run.rank_log(1, "h800-01", 0).write_text("zero\n")
    run.rank_log(1, "h800-02", 1).write_text("one\n")
    first = lines_of(run, **view)[0]
    assert first == f"── no log of {asked} is here yet; there are those of h800-01,02:0-1 ──"


def test_after_a_failed_gate_tail_ends_with_the_fault_and_what_to_type(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    submit_as(run, 999_999_999)
    write_verdict(run, 1, [("h800-01", "gpu.count", "FAIL", "7")], fix="mend it")
    end_as(run, "FAILED", 10, reason="preflight FAIL")
    out = io.StringIO()
    assert tail(run, out=out, follow=False) == 10
    text = out.getvalue()
    assert "FAIL gpu.count on h800-01: 7 (expected: 8)" in text
    assert "fix: mend it" in text
    assert f"next: janus-cluster resume {run.path}   # the same run, when it is mended" in text


def test_bad_expression_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--grep"):
        tail(make_run(tmp_path), out=io.StringIO(), grep="(")


def test_run_that_was_never_submitted_cannot_be_followed(tmp_path: Path) -> None:
    with pytest.raises(JobNotFound, match="was not submitted"):
        tail(make_run(tmp_path), out=io.StringIO())


def test_a_run_whose_folder_is_removed_is_not_waited_for(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    run = make_run(tmp_path)
    submit_as(run, sleeper.pid)
    run.node_log(1, "h800-01").write_text("here\n")
    remover = threading.Timer(0.3, shutil.rmtree, [run.path])
    remover.start()
    with pytest.raises(JobNotFound, match="is gone"):
        tail(run, out=io.StringIO(), poll_s=0.02, state_poll_s=0.1)
    remover.join()


def test_ctrl_c_leaves_the_job_alone(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    run = make_run(tmp_path)
    submit_as(run, sleeper.pid)
    run.node_log(1, "h800-01").write_text("here\n")
    code = (
        "import sys; from pathlib import Path; from janus_cluster.run.paths import RunDir; "
        "from janus_cluster.observe.tail import tail; sys.exit(tail(RunDir(Path(sys.argv[1])), out=sys.stdout))"
    )
    watcher = subprocess.Popen([sys.executable, "-c", code, str(run.path) + "/."], stdout=subprocess.PIPE, text=True)
    assert watcher.stdout is not None
    assert watcher.stdout.readline() == "h800-01 | here\n"
    watcher.send_signal(signal.SIGINT)
    rest, _ = watcher.communicate(timeout=600)
    assert watcher.returncode == 130
    assert "the job goes on" in rest
    assert sleeper.poll() is None


def test_reader_that_goes_away_ends_tail_quietly(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    run = make_run(tmp_path)
    submit_as(run, sleeper.pid)
    run.node_log(1, "h800-01").write_text("line\n" * 100_000)
    argv = [sys.executable, "-m", "janus_cluster.cli", "tail", str(run.path), "-n", "100000"]
    watcher = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert watcher.stdout is not None and watcher.stderr is not None
    watcher.stdout.readline()
    watcher.stdout.close()
    assert watcher.wait(timeout=600) == 141
    assert watcher.stderr.read() == b""
    watcher.stderr.close()


def test_terminal_gets_colours_and_a_pipe_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    run = make_run(tmp_path)
    submit_as(run, 999_999_999)
    run.node_log(1, "h800-01").write_text("here\nboth\n")
    run.node_log(1, "h800-02").write_text("there\nboth\n")
    run.rank_log(1, "h800-02", 1).write_text("rank\n")
    run.batch_log.write_text("script\n")
    end_as(run, "COMPLETED", 0)
    parent, child = os.openpty()
    pieces: list[bytes] = []
    with os.fdopen(child, "w") as terminal:
        reader = threading.Thread(target=read_terminal, args=(parent, pieces))
        reader.start()
        tail(run, out=terminal, follow=False)
    reader.join()
    os.close(parent)
    shown = b"".join(pieces).decode()
    colours = {word: colour for colour, word in re.findall(r"\x1b\[(\d+)m\S+ \|\x1b\[0m (\w+)", shown)}
    assert set(colours) == {"here", "there", "both", "rank", "script"}
    assert len({colours[word] for word in ("here", "there", "both", "script")}) == 4
    assert colours["rank"] == colours["there"], "a node has one colour"
    pipe = io.StringIO()
    tail(run, out=pipe, follow=False)
    assert "\x1b" not in pipe.getvalue()


def read_terminal(parent: int, shown: list[bytes]) -> None:
    """All that comes, until the other end is closed."""
    with contextlib.suppress(OSError):
        while data := os.read(parent, 10_000):
            shown.append(data)


def test_terminal_has_one_live_line_below_the_ranks_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sleeper: subprocess.Popen[bytes]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    run = make_run(tmp_path)
    submit_as(run, sleeper.pid)
    job_id = f"local-{sleeper.pid}"
    end_as(run, "RUNNING", None, job_id=job_id, phase="training")
    step = {"step": 3, "total_steps": 20, "loss": 1.5, "step_time_s": 2.0, "samples_per_s": 4.0, "attempt": 1}
    ranks = {"gpu_memory_peak_gb": [61.2, 78.0]}
    logs = [run.rank_log(1, "h800-01", 0), run.rank_log(1, "h800-02", 1)]
    for log in logs:
        log.write_text("")
    parent, child = os.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
    shown: list[bytes] = []
    reader = threading.Thread(target=read_terminal, args=(parent, shown))
    reader.start()

    def work() -> None:
        time.sleep(0.2)
        with logs[0].open("a") as f:
            f.write(stamped(time.time(), "Loading:  25%|██▌  | 1/4 [00:01<00:05,  1.90s/it]"))
            f.write(stamped(time.time(), "both print it"))
        time.sleep(0.3)
        append_metric_line(run, {"kind": "train", "time": time.time(), **step, "ranks": ranks})
        with logs[0].open("a") as f:
            f.write(stamped(time.time(), "step 3/20 loss 1.500 action 1.286 lr 1.0e-03 step_time_s 2.00"))
        with logs[1].open("a") as f:
            f.write(stamped(time.time(), "both print it"))
        time.sleep(0.4)
        end_as(run, "COMPLETED", 0, job_id=job_id)

    worker = threading.Thread(target=work)
    worker.start()
    with os.fdopen(child, "w") as terminal:
        assert tail(run, out=terminal, poll_s=0.05) == 0
    worker.join()
    reader.join()
    os.close(parent)
    screen = b"".join(shown).decode()
    live = "step 3/20 · 2.00 s/step · 4.00 samples/s · loss 1.5000 · ETA 34 s · GPU memory 61.2 to 78.0 GB"
    assert "no step yet · Loading 25%" in screen
    assert f"{live} · Loading 25%" in screen
    rows = [row.rpartition("\x1b[2K")[2] for row in screen.split("\r\n")]
    assert rows.count("h800-01,02:0-1 | both print it  ×2") == 1
    assert [row for row in rows if "action" in row or "%|" in row] == []
    end = rows.index("── COMPLETED (exit code 0, source: status.json) ──")
    assert rows[end - 1].startswith(live), "the last progress stays"
    assert rows[-2].startswith("  next: janus-cluster "), "what to do with the result"
