"""Evidence × class. Texts were captured from torch 2.13 and Slurm 22.05, those of GPUs from their own sources."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from janus_cluster.diagnosis.card import load_card, load_failure, next_steps, render_card
from janus_cluster.diagnosis.evidence import Evidence, RankError, RankExit, load_evidence, parse_exits
from janus_cluster.diagnosis.failure import classify, is_follow_up, kind_of_message
from janus_cluster.errors import FailureKind
from janus_cluster.node.oom import describe_oom_kills
from janus_cluster.node.torchrun import describe_killed_torchrun
from janus_cluster.node.training import TRANSIENT
from janus_cluster.run.files import write_json_atomically
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.attempt import AttemptRecord
from janus_cluster.run.records.bundle import ResolvedRecord
from janus_cluster.run.records.failure import FailureRecord, RankFailure, ScriptFailure
from janus_cluster.run.records.submission import SubmissionRecord
from janus_cluster.slurm.state import JobState

CLOSED = (
    "RuntimeError: Connection closed by peer [127.0.0.1]:29578. This is typically caused by a remote worker crashing."
)
RESET = "RuntimeError: Read error [127.0.0.1]:21739: Connection reset by peer. This is typically caused by a remote w"
WAITED = "RuntimeError: Timed out waiting 20000ms for recv operation to complete"
WATCHDOG = (
    "[rank3]:[E1121 05:18:18 ProcessGroupNCCL.cpp:632] [Rank 3] Watchdog caught collective operation timeout: WorkNCCL("
    "SeqNum=7, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=600000) ran for 600013 milliseconds before timing "
    "out."
)
CUDA_OOM = (
    "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 3 has a total capacity of 79.11 GiB of "
    "which 1.20 GiB is free."
)
# The end of an agent's log after SIGKILL of rank 2: captured.
TABLE = """\
W1121 05:18:36.680000 28042 torch/distributed/elastic/multiprocessing/api.py:1028] Sending process 27459 closing signal SIGTERM
torch.distributed.elastic.multiprocessing.errors.ChildFailedError: 
============================================================
failing FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-21_05:17:27
  host      : localhost
  rank      : 3 (local_rank: 1)
  exitcode  : -15 (pid: 27459)  (SIGTERM)
  error_file: <N/A>
  traceback : Signal 15 (SIGTERM) received by PID 27459
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-21_05:17:27
  host      : localhost
  rank      : 2 (local_rank: 0)
  exitcode  : -9 (pid: 27457)  (SIGKILL)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 27457
============================================================
"""  # noqa: E501, W291
# What is in an agent's log of a rank that ended while it imported torch, before it had a log of its own: captured.
ABORTED = """\
train: torchrun, node 1 of 1, 2 processes here, rendezvous 127.0.0.1:26685
terminate called after throwing an instance of 'std::bad_alloc'
  what():  std::bad_alloc
"""
RANKS = ((0, "a"), (1, "a"), (2, "b"), (3, "b"))


def steps_of(failure: FailureRecord, *, run: RunDir, **more: Any) -> list[str]:
    """What the card prints to be typed, with RUN for the run folder."""
    return [step.replace(str(run.path), "RUN") for step in next_steps(failure, run=run, **more)]


def error(rank: int, message: str, *, at: float = 0.0, frames: tuple[str, ...] = (), **recorded: Any) -> RankError:
    return RankError(node="ab"[rank // 2], rank=rank, time=at, message=message, frames=frames, **recorded)


def evidence(state: str = "FAILED", **changes: object) -> Evidence:
    values: dict[str, object] = {"exit_code": 12, "nodes": ("a", "b"), "ranks": RANKS} | changes
    return Evidence(state=state, **values)  # type: ignore[arg-type]


def batch(text: str) -> tuple[tuple[str, str], ...]:
    return (("batch", text),)


CASES: dict[str, tuple[Evidence, tuple[str, int | None, str | None]]] = {
    "the earliest own error": (
        evidence(errors=(error(0, "KeyError: 'x'", at=2.0), error(3, "ValueError: y", at=1.5))),
        ("exception", 3, "b"),
    ),
    "a follow-up is never first, though earlier": (
        evidence(errors=(error(0, CLOSED, at=1.0), error(1, RESET, at=1.1), error(2, "ValueError: y", at=1.2))),
        ("exception", 2, "b"),
    ),
    "only follow-ups: the one that is silent": (
        evidence(errors=(error(0, CLOSED), error(1, RESET), error(3, CLOSED))),
        ("unknown", 2, "b"),
    ),
    "only follow-ups of one node: the other": (
        evidence(errors=(error(0, CLOSED), error(1, RESET))),
        ("unknown", None, "b"),
    ),
    "killed": (
        evidence(errors=(error(0, CLOSED),), exits=tuple(parse_exits(TABLE, "b"))),
        ("signal", 2, "b"),
    ),
    "killed by torchrun afterwards is not first": (
        evidence(errors=(error(0, CLOSED),), exits=(RankExit(node="b", rank=3, code=-9, was_closed=True),)),
        ("unknown", None, None),
    ),
    "those who waited did not stand still": (
        evidence(errors=(error(0, WAITED), error(2, WAITED), error(3, WAITED))),
        ("nccl_timeout", 1, "a"),
    ),
    "NCCL's watchdog aborts": (
        evidence(
            exits=(RankExit(node="b", rank=3, code=-6),), logs=(("b:3", f"step 9\n{WATCHDOG}\nterminate called"),)
        ),
        ("nccl_timeout", 3, "b"),
    ),
    "GPU memory": (evidence(errors=(error(1, CUDA_OOM),)), ("gpu_out_of_memory", 1, "a")),
    "host memory": (evidence(errors=(error(1, "MemoryError"),)), ("host_out_of_memory", 1, "a")),
    "a rank that a failed allocation aborts": (
        evidence(exits=(RankExit(node="b", rank=3, code=-6),), logs=(("b", ""), ("b:3", f"step 9\n{ABORTED}"))),
        ("host_out_of_memory", 3, "b"),
    ),
    "a rank that a failed allocation aborts before it has a log": (
        evidence(
            exits=tuple(parse_exits(ABORTED + TABLE.replace("-9", "-6"), "b")),
            logs=(("b", ABORTED + TABLE.replace("-9", "-6")),),
            ranks=RANKS[:2],
        ),
        ("host_out_of_memory", 2, "b"),
    ),
    "torchrun itself is aborted by a failed allocation": (
        evidence(reason="training ended with exit code 134", logs=(("a", ""), ("b", ABORTED)), ranks=()),
        ("host_out_of_memory", None, "b"),
    ),
    "torchrun cannot map a library": (
        evidence(
            logs=(("a", "ImportError: libcublasLt.so.13: failed to map segment: Cannot allocate memory"),),
            ranks=(),
        ),
        ("host_out_of_memory", None, "a"),
    ),
    "a rank's own log counts before the node's": (
        evidence(logs=(("b", ABORTED), ("b:2", "OSError: [Errno 28] No space left on device"))),
        ("disk_full", 2, "b"),
    ),
    "a killed rank with a log of its own is not judged by the node's": (
        evidence(exits=(RankExit(node="b", rank=3, code=-9),), logs=(("b", ABORTED), ("b:3", "step 9"))),
        ("signal", 3, "b"),
    ),
    "a rank that the kernel killed for want of memory": (
        evidence(
            exits=(RankExit(node="b", rank=3, code=-9),),
            logs=(("b", describe_oom_kills(1)), ("b:3", "step 9")),
            errors=(error(0, CLOSED),),
        ),
        ("host_out_of_memory", 3, "b"),
    ),
    "torchrun itself was killed": (
        evidence(errors=(error(0, CLOSED),), logs=(("b", f"step 9\n{describe_killed_torchrun('SIGKILL')}\n"),)),
        ("signal", None, "b"),
    ),
    "torchrun was killed for want of memory": (
        evidence(logs=(("b", f"{describe_oom_kills(9)}\n{describe_killed_torchrun('SIGKILL')}"),)),
        ("host_out_of_memory", None, "b"),
    ),
    "torchrun that the attempt ended is no cause": (
        evidence(logs=(("b", describe_killed_torchrun("SIGINT")),)),
        ("unknown", None, None),
    ),
    "the task with its torchrun was killed": (
        evidence(
            errors=(error(0, CLOSED),),
            logs=batch("srun: error: b: task 1: Killed\nsrun: Terminating StepId=7.3\nsrun: error: a: task 0: Killed"),
        ),
        ("signal", None, "b"),
    ),
    "a task that ended with an exit code was not killed": (
        evidence(
            logs=batch("srun: error: b: task 1: Exited with exit code 1\nsrun: error: a: task 0: Killed"),
            errors=(error(3, "ValueError: y"),),
        ),
        ("exception", 3, "b"),
    ),
    "SIGBUS": (evidence(exits=(RankExit(node="b", rank=3, code=-7),)), ("signal", 3, "b")),
    "a file handle that went stale": (
        evidence(errors=(error(1, "OSError: [Errno 116] Stale file handle: '/data/x.png'"),)),
        ("file_system", 1, "a"),
    ),
    "a file system that takes no writes": (
        evidence(errors=(error(1, "OSError: [Errno 30] Read-only file system: '/runs/x'"),)),
        ("read_only", 1, "a"),
    ),
    "a disk that was full before any rank began": (
        evidence(exit_code=1, ranks=(), logs=batch("OSError: [Errno 28] No space left on device: 'logs/attempt_1'")),
        ("disk_full", None, None),
    ),
    "quota": (evidence(errors=(error(1, "OSError: [Errno 122] Disk quota exceeded"),)), ("disk_full", 1, "a")),
    "disk full in torch.save": (
        evidence(
            errors=(error(0, "RuntimeError: [enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),)
        ),
        ("disk_full", 0, "a"),
    ),
    "NaN loss": (
        evidence(errors=(error(0, "TrainingFailed: the loss of step 7 is nan", kind="diverged"),)),
        ("diverged", 0, "a"),
    ),
    "a rank that reports another one's failure is never first, for any message": (
        evidence(
            errors=(
                error(0, "TrainingFailed: the loss was not finite on another rank", at=1.0, is_follow_up=True),
                error(3, "TrainingFailed: the loss is nan", at=2.0, kind="diverged"),
            )
        ),
        ("diverged", 3, "b"),
    ),
    "our own error that quotes a lost connection is a cause": (
        evidence(errors=(error(1, f"TrainingFailed: the frames' server: {CLOSED}", kind="bad_data"),)),
        ("bad_data", 1, "a"),
    ),
    "a GPU that fell off": (
        evidence(
            errors=(error(2, "AcceleratorError: CUDA error: unspecified launch failure"),),
            logs=(("b", "NVRM: Xid (PCI:0000:1b:00): 79, pid=4711, GPU has fallen off the bus."),),
        ),
        ("xid", 2, "b"),
    ),
    "an ECC error": (
        evidence(errors=(error(2, "RuntimeError: CUDA error: uncorrectable ECC error"),)),
        ("xid", 2, "b"),
    ),
    "a link": (
        evidence(errors=(error(2, "DistBackendError: NCCL error: got completion with IBV_WC_RETRY_EXC_ERR 12"),)),
        ("network", 2, "b"),
    ),
    "walltime, from Slurm": (evidence("TIMEOUT", exit_code=None), ("walltime", None, None)),
    "walltime, from the batch log": (
        evidence(
            logs=batch("slurmstepd: error: *** JOB 7 ON a CANCELLED AT 2026-11-21T05:00:00 DUE TO TIME LIMIT ***")
        ),
        ("walltime", None, None),
    ),
    "preempted": (
        evidence(
            "CANCELLED",
            logs=batch("slurmstepd: error: *** JOB 7 ON a CANCELLED AT 2026-11-21T05:00:00 DUE TO PREEMPTION ***"),
        ),
        ("preempted", None, None),
    ),
    "a node lost": (
        evidence("NODE_FAIL", logs=batch("srun: error: Node failure on b\n"), errors=(error(0, CLOSED),)),
        ("node_lost", None, "b"),
    ),
    "the kernel's memory killer": (
        evidence(
            logs=batch("slurmstepd: error: Detected 1 oom-kill event(s) in StepId=7.1."), errors=(error(0, CLOSED),)
        ),
        ("host_out_of_memory", None, None),
    ),
    "cancelled": (
        evidence(
            "CANCELLED", exit_code=13, reason="SIGTERM ended the attempt", errors=(error(0, "SignalException: 15"),)
        ),
        ("cancelled", None, None),
    ),
    "stopped in time": (
        evidence("STOPPED", exit_code=13, reason="USR1", kind="walltime"),
        ("walltime", None, None),
    ),
    "the gate": (evidence(exit_code=10, reason="preflight FAIL: b paths.model"), ("preflight", None, None)),
    "the gate's own error": (evidence(kind="preflight", reason="preflight FAIL"), ("preflight", None, None)),
    "code that changed": (
        evidence(kind="environment", exit_code=2, reason="janus_cluster has changed", ranks=()),
        ("environment", None, None),
    ),
    "no verdict": (evidence(exit_code=11, reason="b did not report"), ("preflight_undetermined", None, None)),
    "a script that ended": (
        evidence(
            exit_code=2,
            ranks=(),
            script=ScriptFailure(job_id="7", node="a", message="environment.setup: exit code 1 of: module load x"),
        ),
        ("environment", None, "a"),
    ),
    "no module": (
        evidence(exit_code=1, ranks=(), logs=batch("ModuleNotFoundError: No module named 'pydantic'")),
        ("environment", None, None),
    ),
    "no module, above torchrun's long table": (
        evidence(ranks=(), logs=(("a", "ModuleNotFoundError: No module named 'peft'\n" + TABLE + "  pid: 1\n" * 60),)),
        ("environment", None, "a"),
    ),
    "slurmd cannot open the log (0:53)": (evidence(exit_code=181, ranks=()), ("environment", None, "a")),
    "a job that slurmd could not launch": (
        evidence("REQUEUE_HOLD", exit_code=None, ranks=(), reason="launch failed requeued held"),
        ("environment", None, "a"),
    ),
    "a signal that only the exit code shows": (evidence(exit_code=137, ranks=()), ("signal", None, None)),
    "nothing at all": (evidence(exit_code=1), ("unknown", None, None)),
}


@pytest.mark.parametrize(("code", "advice"), [(-7, "/dev/shm"), (-9, "out of memory"), (-11, None)])
def test_a_signal_with_a_usual_cause_has_its_remedy_before_resume(
    code: int, advice: str | None, tmp_path: Path
) -> None:
    failure = classify(evidence(exits=(RankExit(node="b", rank=3, code=code),)))
    assert failure is not None
    first, *rest = steps_of(failure, run=RunDir(tmp_path), checkpoint=None, resolved=ResolvedRecord())
    if advice is None:
        assert first.startswith("janus-cluster resume RUN")
    else:
        assert advice in first and "on b" in first and rest[0].startswith("janus-cluster resume RUN")


def test_a_fault_of_a_file_system_is_worth_another_attempt() -> None:
    assert "file_system" in TRANSIENT and "read_only" not in TRANSIENT


@pytest.mark.parametrize("case", CASES)
def test_the_class_and_the_first_rank(case: str) -> None:
    given, wanted = CASES[case]
    found = classify(given)
    assert found is not None
    assert (found.kind, found.rank, found.node) == wanted, found


def test_an_attempt_that_went_well_has_no_failure() -> None:
    assert classify(evidence("COMPLETED", exit_code=0, errors=(error(0, "ValueError: handled"),))) is None


@pytest.mark.parametrize(
    "line", ["loss 2.31 grad_norm inf", "step 3/40 loss 1.5 in 2 s", "training began", "heartbeat"]
)
def test_lines_of_a_healthy_log_belong_to_no_class(line: str) -> None:
    assert kind_of_message(line) is None


def test_a_time_out_is_no_follow_up_and_a_lost_peer_is() -> None:
    assert not is_follow_up(WAITED)
    assert is_follow_up(CLOSED)
    assert is_follow_up("DistNetworkError: The client socket has failed to connect to [h800-01]:29500")


def test_the_table_of_torchrun_shows_which_rank_was_closed() -> None:
    assert parse_exits(TABLE, "b") == [
        RankExit(node="b", rank=3, code=-15, was_closed=True),
        RankExit(node="b", rank=2, code=-9, was_closed=False),
    ]


def make_run(folder: Path) -> RunDir:
    run = RunDir(folder / "demo-1")
    run.path.mkdir()
    run.begin_attempt()
    return run


def read(run: RunDir, attempt: int = 1) -> Evidence:
    return load_evidence(
        run, attempt=attempt, state="FAILED", exit_code=12, reason=None, nodes=("a",), secrets={"HF_TOKEN": "hf_123456"}
    )


def test_lines_of_the_attempt_before_are_not_this_ones(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.begin_attempt()
    run.batch_log.write_text(
        "attempt 1 of demo-1: job 7 on a\nslurmstepd: error: *** JOB 7 ON a CANCELLED AT 2026-11-21T05:00:00 DUE TO "
        "TIME LIMIT ***\nattempt 2 of demo-1: job 7 on a\n"
    )
    run.rank_log(2, "a", 0).write_text(
        'Traceback (most recent call last):\n  File "x.py", line 1, in f\nValueError: y\n'
    )
    found = classify(read(run, 2))
    assert found is not None
    assert (found.kind, found.rank, found.message) == ("exception", 0, "ValueError: y")
    assert found.frames == ('File "x.py", line 1, in f',)


def test_words_before_a_resume_are_not_this_jobs(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.batch_log.write_text("*** JOB 7 ON a CANCELLED AT 2026-11-21T05:00:00 DUE TO TIME LIMIT ***\n")
    ScriptFailure(job_id="6", node="a", message="there is no python here").write(run.script_failure_json)
    begins = run.batch_log.stat().st_size
    for job_id, kind in (("7", "unknown"), ("6", "environment")):
        SubmissionRecord(cluster="slurm", job_id=job_id, batch_log_bytes=begins).write(run.submission_json)
        found = classify(read(run))
        assert found is not None and found.kind == kind
    assert (found.node, found.message) == ("a", "there is no python here")


def test_logs_are_read_with_bounds_and_hold_no_escapes_and_no_secrets(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with run.rank_log(1, "a", 0).open("wb") as f:
        f.seek(5_000_000_000)
        f.write(b"\nTraceback (most recent call last):\nValueError: \x1b]0;owned\x07token hf_123456 \x9b2J\n")
    began = time.process_time()
    found = classify(read(run))
    assert time.process_time() - began < 2
    assert found is not None
    assert found.message is not None
    assert "\x1b" not in found.message
    assert "owned" not in found.message
    assert "token <HF_TOKEN>" in found.message


@pytest.mark.parametrize("content", [b"", b"{", b'{"message": "text"}', b"\xff\xfe", b'{"message": {"extraInfo": []}}'])
def test_a_damaged_error_file_is_passed_over(tmp_path: Path, content: bytes) -> None:
    run = make_run(tmp_path)
    folder = run.torchrun_logs(1, "a") / "none_x" / "attempt_0" / "0"
    folder.mkdir(parents=True)
    (folder / "error.json").write_bytes(content)
    assert read(run).errors == ()


def test_the_card_names_the_last_complete_checkpoint_and_what_to_type(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for step, size in ((10, 4), (20, 4), (30, 3)):
        folder = run.checkpoints / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(b"x" * size)
        if step != 20:
            files = {"weights": {"bytes": 4, "sha256": "0" * 64}}
            write_json_atomically(folder / "manifest.json", {"schema_version": 2, "step": step, "files": files})
    state = JobState(state="FAILED", source="status.json", exit_code=137, nodes=("a",), attempt=1)
    card = load_card(run, state)
    assert card is not None
    shown = "\n".join(render_card(card))
    assert f"step 10: {run.checkpoints / 'checkpoint-10'}" in shown
    assert f"next: janus-cluster resume {run.path}   # goes on after step 10" in shown
    assert load_card(run, JobState(state="RUNNING", source="x")) is None


def test_too_little_gpu_memory_suggests_a_smaller_batch_of_the_same_effective_size(tmp_path: Path) -> None:
    failure = FailureRecord(kind="gpu_out_of_memory", rank=3, node="b")
    job = {"training": {"per_device_batch_size": 6, "gradient_accumulation_steps": 2}}
    first = steps_of(failure, run=RunDir(tmp_path), checkpoint=None, resolved=ResolvedRecord(job=job))[0]
    options = "--set training.per_device_batch_size=3 --set training.gradient_accumulation_steps=4"
    assert first.startswith(f"janus-cluster resume RUN {options}   # "), "a new run would lose what this one has learnt"


GONE = "RuntimeError: DataLoader worker (pid(s) 11604) exited unexpectedly"
UNSENT = "TrainingFailed: a data loader's worker could not hand over a batch: "
SHM = "RuntimeError: unable to allocate shared memory(shm) for file </torch_12_27_0>: No space left on device (28)"
IN_COLLATE = f"RuntimeError: Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback:\n  x\n{SHM}\n"
KILLED = "RuntimeError: DataLoader worker (pid 5) is killed by signal: Killed. "
BUS = "ERROR: Unexpected bus error encountered in worker. This might be caused by insufficient shared memory (shm)."
SEMAPHORE = ('File "/usr/lib/python3.11/multiprocessing/synchronize.py", line 57, in __init__: sl = SemLock(',)


@pytest.mark.parametrize(
    ("message", "frames", "log", "shown", "first"),
    [
        (UNSENT + SHM, (), "", SHM, "df -h /dev/shm"),
        (IN_COLLATE, (), "", SHM, "df -h /dev/shm"),
        (GONE, (), BUS, BUS, "df -h /dev/shm"),
        ("OSError: [Errno 28] No space left on device", SEMAPHORE, "", "Errno 28", "df -h /dev/shm"),
        (UNSENT + "OSError: AF_UNIX path too long", (), "", "AF_UNIX path too long",
         "janus-cluster resume RUN --set environment.variables.TMPDIR=/tmp "),
        (KILLED, (), "", "killed by signal", "janus-cluster resume RUN --set data.num_workers=2 "),
        (UNSENT + "OSError: [Errno 24] Too many open files", (), "", "Too many open files",
         "janus-cluster resume RUN --set data.num_workers=0 "),
    ],
)  # fmt: skip
def test_a_loader_that_cannot_go_on_is_named_with_its_workers_words_and_not_resumed_as_it_is(
    *, tmp_path: Path, message: str, frames: tuple[str, ...], log: str, shown: str, first: str
) -> None:
    kind: FailureKind | None = "loader" if message.startswith(UNSENT) else None
    errors = (error(2, message, frames=frames, kind=kind),)
    found = classify(evidence(errors=errors, logs=(("b:2", f"step 1\n{log}\n"),)))
    assert found is not None
    assert (found.kind, found.rank, found.node) == ("loader", 2, "b")
    assert shown in (found.message or "").split("\n")[0]
    assert found.kind not in TRANSIENT, "the same allocation would meet it again"
    resolved = ResolvedRecord(job={"data": {"num_workers": 4}})
    steps = steps_of(found, run=RunDir(tmp_path), checkpoint=None, resolved=resolved)
    assert steps[0].startswith(first)
    assert not any(step.startswith("janus-cluster resume RUN   #") for step in steps)


def test_a_loader_that_only_stops_is_a_hang() -> None:
    assert kind_of_message("RuntimeError: DataLoader timed out after 1800 seconds") == "hang"


@pytest.mark.parametrize(
    "message",
    [
        "UsageError: model.vggt_path: /v: 1 tensors hold values that are not finite (NaN or infinite): a.b",
        "TrainingFailed: the loss is not finite at step 1 on rank 0, before any weight was changed: the weights or the "
        "data give it, not the learning rate",
    ],
)
def test_spoilt_weights_are_not_blamed_on_the_learning_rate(tmp_path: Path, message: str) -> None:
    found = classify(evidence(errors=(error(0, message, kind="bad_weights"),)))
    assert found is not None and found.kind == "bad_weights"
    steps = steps_of(found, run=RunDir(tmp_path), checkpoint=None, resolved=ResolvedRecord())
    assert "model.vggt_path=" in steps[1] and not any("learning_rate" in step for step in steps)


@pytest.mark.parametrize(
    ("kind", "job", "first"),
    [
        ("host_out_of_memory", {"data": {"num_workers": 8}}, "janus-cluster resume RUN --set data.num_workers=4 "),
        ("host_out_of_memory", {"slurm": {"mem": "64G"}}, "janus-cluster resume RUN --set slurm.mem=0 "),
        ("gpu_out_of_memory", {"training": {"gradient_checkpointing": False}},
         "janus-cluster resume RUN --set training.gradient_checkpointing=true "),
        ("gpu_out_of_memory", {"deepspeed": {"profile": "zero2"}},
         "janus-cluster resume RUN --set deepspeed.profile=zero3 "),
        ("gpu_out_of_memory", {"deepspeed": {"profile": "zero3"}}, "janus-cluster submit "),
    ],
)  # fmt: skip
def test_what_can_go_on_is_not_begun_anew(tmp_path: Path, kind: FailureKind, job: dict[str, Any], first: str) -> None:
    failure = FailureRecord(kind=kind)
    steps = steps_of(failure, run=RunDir(tmp_path), checkpoint=None, resolved=ResolvedRecord(job=job))
    assert steps[0].startswith(first)


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
         "tried to allocate 3981312 bytes. Error code 12 (Cannot allocate memory)", "host_out_of_memory"),
        ("RuntimeError: std::bad_alloc", "host_out_of_memory"),
        ("terminate called after throwing an instance of 'std::bad_alloc'", "host_out_of_memory"),
        ("_ArrayMemoryError: Unable to allocate 8.00 EiB for an array with shape (1,)", "host_out_of_memory"),
        ("memory allocation of 4096 bytes failed", "host_out_of_memory"),
        ("DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:268, unhandled cuda error\nLast error:\nCuda failure 2 "
         "'out of memory'", "gpu_out_of_memory"),
    ],
)  # fmt: skip
def test_every_message_that_memory_ran_out_is_known(words: str, kind: str) -> None:
    assert kind_of_message(words) == kind


REFUSED = "UsageError: /d/train_guide.json.gz: 40 of 60 trajectories (66.7%) have no folder of frames under /d/images"
HINT = "if no more was rendered: --set data.max_absent_fraction=0.67; or name the folder that holds them"


def test_data_that_was_refused_has_the_remedy_of_the_rank_on_the_card(tmp_path: Path) -> None:
    frames = ('File "/x/janus_cluster/janusvln/data/index.py", line 9, in judge_absent',)
    failure = classify(evidence(errors=(error(0, REFUSED, frames=frames, type="UsageError", hint=HINT),)))
    assert failure is not None and (failure.kind, failure.hint) == ("bad_data", HINT)
    run = RunDir(tmp_path / "demo-1")
    steps = steps_of(failure, run=run, checkpoint=None, resolved=ResolvedRecord())
    assert steps == ["janus-cluster submit RUN/job.yaml --set data.max_absent_fraction=0.67", HINT]


def test_one_broken_frame_is_mended_and_the_run_goes_on(tmp_path: Path) -> None:
    failure = FailureRecord(
        kind="bad_data", message="TrainingFailed: /d/a.png: cannot be decoded", path="/d/a.png", hint=HINT
    )
    (step,) = steps_of(failure, run=RunDir(tmp_path), checkpoint=None, resolved=ResolvedRecord())
    assert step.startswith("repair or remove /d/a.png, then: janus-cluster resume RUN")


def stored(run: RunDir, kind: FailureKind, *, state: str = "FAILED") -> FailureRecord:
    """The attempt has ended and keeps a failure, which none of its logs proves."""
    failure = FailureRecord(kind=kind, rank=3, node="b", message="as stored", hint="do this", exit_code=12)
    record = AttemptRecord(attempt=1, from_step=0, started_at=1.0, ended_at=2.0, state=state, failure=failure)
    record.write(run.attempt_json(1))
    run.rank_log(1, "a", 0).write_text("Traceback (most recent call last):\nValueError: y\n")
    return failure


def failure_at_desk(run: RunDir, state: str) -> FailureRecord:
    found = load_failure(run, JobState(state=state, source="x", exit_code=12, nodes=("a",), attempt=1))
    assert found is not None
    return found


def test_the_card_shows_what_the_attempt_stored_and_does_not_classify_again(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    failure = stored(run, "diverged")
    assert failure_at_desk(run, "FAILED") == failure
    card = load_card(run, JobState(state="FAILED", source="x", exit_code=12, attempt=1))
    assert card is not None
    assert "rank 3 on b" in "\n".join(render_card(card))


@pytest.mark.parametrize(
    ("kind", "record_state", "state", "shown"),
    [
        # Slurm alone knows these.
        ("exception", "FAILED", "NODE_FAIL", "node_lost"),
        ("cancelled", "CANCELLED", "TIMEOUT", "walltime"),
        ("walltime", "STOPPED", "CANCELLED", "cancelled"),
        # The same from both: the attempt knows the rank.
        ("host_out_of_memory", "FAILED", "OUT_OF_MEMORY", "host_out_of_memory"),
        ("cancelled", "CANCELLED", "CANCELLED", "cancelled"),
        # Not explained on the node: another node's log may have come later.
        ("unknown", "FAILED", "FAILED", "exception"),
    ],
)
def test_the_desk_classifies_what_no_attempt_could_store(
    *, tmp_path: Path, kind: FailureKind, record_state: str, state: str, shown: str
) -> None:
    run = make_run(tmp_path)
    failure = stored(run, kind, state=record_state)
    found = failure_at_desk(run, state)
    assert found.kind == shown
    assert (found == failure) == (kind == shown)


def test_an_attempt_that_was_killed_is_classified_at_the_desk(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    stored(run, "diverged")
    record = AttemptRecord.require(run.attempt_json(1))
    replace(record, state="RUNNING", ended_at=None, failure=None).write(run.attempt_json(1))
    assert failure_at_desk(run, "FAILED").message == "ValueError: y"


def test_the_rank_s_own_record_counts_before_torchrun_s_file_and_the_log(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.rank_log(1, "a", 0).write_text("Traceback (most recent call last):\nValueError: from the log\n")
    folder = run.torchrun_logs(1, "a") / "none_x" / "attempt_0" / "0"
    folder.mkdir(parents=True)
    error_file = {"message": "ValueError: from torchrun", "extraInfo": {"py_callstack": "", "timestamp": "1"}}
    write_json_atomically(folder / "error.json", {"message": error_file})
    assert [e.message for e in read(run).errors] == ["ValueError: from torchrun"]
    path = run.rank_failure_json(1, 0)
    path.parent.mkdir()
    trace = 'Traceback (most recent call last):\n  File "x.py", line 1, in f\n    g()\nTrainingFailed: own hf_123456\n'
    own = RankFailure(rank=0, node="a", time=5.0, type="TrainingFailed", message="own hf_123456", kind="diverged")
    replace(own, traceback=trace, hint="hf_123456").write(path)
    (found,) = read(run).errors
    assert (found.message, found.kind, found.hint) == ("TrainingFailed: own <HF_TOKEN>", "diverged", "<HF_TOKEN>")
    assert found.frames == ('File "x.py", line 1, in f', "  g()")
