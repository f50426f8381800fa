"""Evidence × class. Texts were captured from torch 2.13 and Slurm 22.05, those of GPUs from their own sources."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from janus_cluster.node.training import TRANSIENT
from janus_cluster.observe.card import load_card, next_steps, render_card
from janus_cluster.observe.evidence import Evidence, RankError, RankExit, load_evidence, parse_exits
from janus_cluster.observe.failure import Failure, Kind, classify, is_follow_up, kind_of_words
from janus_cluster.rundir import RunDir, write_json_atomically
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


def error(rank: int, message: str, *, at: float = 0.0, frames: tuple[str, ...] = ()) -> RankError:
    return RankError(node="ab"[rank // 2], rank=rank, time=at, message=message, frames=frames)


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
        evidence(errors=(error(0, CLOSED),), exits=(RankExit(node="b", rank=3, code=-9, was_told=True),)),
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
    "quota": (evidence(errors=(error(1, "OSError: [Errno 122] Disk quota exceeded"),)), ("disk_full", 1, "a")),
    "disk full in torch.save": (
        evidence(
            errors=(error(0, "RuntimeError: [enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),)
        ),
        ("disk_full", 0, "a"),
    ),
    "NaN loss": (evidence(errors=(error(0, "TrainingFailed: the loss of step 7 is nan"),)), ("diverged", 0, "a")),
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
    "walltime, says Slurm": (evidence("TIMEOUT", exit_code=None), ("walltime", None, None)),
    "walltime, says the batch log": (
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
    "stopped in time": (evidence("STOPPED", exit_code=13, reason="the walltime ends soon"), ("walltime", None, None)),
    "the gate": (evidence(exit_code=10, reason="preflight FAIL: b paths.model"), ("preflight", None, None)),
    "no verdict": (evidence(exit_code=11, reason="b did not report"), ("preflight_undetermined", None, None)),
    "a script that ended": (
        evidence(
            exit_code=2,
            ranks=(),
            logs=batch("job.sbatch on a: environment.setup: exit code 1 of: module load cuda/99\n"),
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
    "a signal that only the exit code tells": (evidence(exit_code=137, ranks=()), ("signal", None, None)),
    "nothing at all": (evidence(exit_code=1), ("unknown", None, None)),
}


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
    assert kind_of_words(line) in (None, "diverged" if "inf" in line else None)


def test_a_time_out_is_no_follow_up_and_a_lost_peer_is() -> None:
    assert not is_follow_up(WAITED)
    assert is_follow_up(CLOSED)
    assert is_follow_up("DistNetworkError: The client socket has failed to connect to [h800-01]:29500")


def test_the_table_of_torchrun_tells_who_was_told_to_end() -> None:
    assert parse_exits(TABLE, "b") == [
        RankExit(node="b", rank=3, code=-15, was_told=True),
        RankExit(node="b", rank=2, code=-9, was_told=False),
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


def test_words_of_the_attempt_before_are_not_this_ones(tmp_path: Path) -> None:
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
    write_json_atomically(run.submission_json, {"batch_log_bytes": run.batch_log.stat().st_size})
    with run.batch_log.open("a") as f:
        f.write("job.sbatch on a: there is no python here\n")
    found = classify(read(run))
    assert found is not None
    assert (found.kind, found.message) == ("environment", "there is no python here")


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
            write_json_atomically(folder / "manifest.json", {"files_bytes": {"weights": 4}})
    state = JobState(state="FAILED", source="status.json", exit_code=137, nodes=("a",), attempt=1)
    card = load_card(run, state, ref="7")
    assert card is not None
    shown = "\n".join(render_card(card))
    assert f"step 10: {run.checkpoints / 'checkpoint-10'}" in shown
    assert "next: janus-cluster resume 7   # goes on after step 10" in shown
    assert load_card(run, JobState(state="RUNNING", source="x"), ref="7") is None


def test_too_little_gpu_memory_suggests_a_smaller_batch_of_the_same_effective_size(tmp_path: Path) -> None:
    failure = Failure(kind="gpu_out_of_memory", rank=3, node="b")
    job = {"training": {"per_device_batch_size": 6, "gradient_accumulation_steps": 2}}
    first = next_steps(failure, run=RunDir(tmp_path), ref="7", checkpoint=None, job=job)[0]
    options = "--set training.per_device_batch_size=3 --set training.gradient_accumulation_steps=4"
    assert first.startswith(f"janus-cluster resume 7 {options}   # "), "a new run would lose what this one has learnt"


GONE = "RuntimeError: DataLoader worker (pid(s) 11604) exited unexpectedly"
SHM = "RuntimeError: unable to allocate shared memory(shm) for file </torch_12_27_0>: No space left on device (28)"
IN_COLLATE = f"RuntimeError: Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback:\n  x\n{SHM}\n"
KILLED = "RuntimeError: DataLoader worker (pid 5) is killed by signal: Killed. "
BUS = "ERROR: Unexpected bus error encountered in worker. This might be caused by insufficient shared memory (shm)."
SEMAPHORE = ('File "/usr/lib/python3.11/multiprocessing/synchronize.py", line 57, in __init__: sl = SemLock(',)


@pytest.mark.parametrize(
    ("message", "frames", "log", "shown", "first"),
    [
        (GONE, (), f"data loader worker: {SHM}", SHM, "df -h /dev/shm"),
        (IN_COLLATE, (), "", SHM, "df -h /dev/shm"),
        (GONE, (), BUS, BUS, "df -h /dev/shm"),
        ("OSError: [Errno 28] No space left on device", SEMAPHORE, "", "Errno 28", "df -h /dev/shm"),
        (GONE, (), "data loader worker: OSError: AF_UNIX path too long", "AF_UNIX path too long",
         "janus-cluster resume 7 --set environment.variables.TMPDIR=/tmp "),
        (KILLED, (), "", "killed by signal", "janus-cluster resume 7 --set data.num_workers=2 "),
        (GONE, (), "data loader worker: OSError: [Errno 24] Too many open files", "Too many open files",
         "janus-cluster resume 7 --set data.num_workers=0 "),
    ],
)  # fmt: skip
def test_a_loader_that_cannot_go_on_is_named_with_its_workers_words_and_not_resumed_as_it_is(
    *, tmp_path: Path, message: str, frames: tuple[str, ...], log: str, shown: str, first: str
) -> None:
    found = classify(evidence(errors=(error(2, message, frames=frames),), logs=(("b:2", f"step 1\n{log}\n"),)))
    assert found is not None
    assert (found.kind, found.rank, found.node) == ("loader", 2, "b")
    assert shown in (found.message or "").split("\n")[0]
    assert found.kind not in TRANSIENT, "the same allocation would meet it again"
    steps = next_steps(found, run=RunDir(tmp_path), ref="7", checkpoint=None, job={"data": {"num_workers": 4}})
    assert steps[0].startswith(first)
    assert not any(step.startswith("janus-cluster resume 7   #") for step in steps)


def test_a_loader_that_only_stands_still_is_a_hang() -> None:
    assert kind_of_words("RuntimeError: DataLoader timed out after 1800 seconds") == "hang"


@pytest.mark.parametrize(
    "message",
    [
        "UsageError: model.vggt_path: /v: 1 tensors hold values that are not finite (NaN or infinite): a.b",
        "TrainingFailed: the loss is not finite at step 1 on rank 0, before any weight was changed: the weights or the "
        "data give it, not the learning rate",
    ],
)
def test_spoilt_weights_are_not_blamed_on_the_learning_rate(tmp_path: Path, message: str) -> None:
    found = classify(evidence(errors=(error(0, message),)))
    assert found is not None and found.kind == "bad_weights"
    steps = next_steps(found, run=RunDir(tmp_path), ref="7", checkpoint=None, job={})
    assert "model.vggt_path=" in steps[1] and not any("learning_rate" in step for step in steps)


@pytest.mark.parametrize(
    ("kind", "job", "first"),
    [
        ("host_out_of_memory", {"data": {"num_workers": 8}}, "janus-cluster resume 7 --set data.num_workers=4 "),
        ("host_out_of_memory", {"slurm": {"mem": "64G"}}, "janus-cluster resume 7 --set slurm.mem=0 "),
        ("gpu_out_of_memory", {"training": {"gradient_checkpointing": False}},
         "janus-cluster resume 7 --set training.gradient_checkpointing=true "),
        ("gpu_out_of_memory", {"deepspeed": {"profile": "zero2"}},
         "janus-cluster resume 7 --set deepspeed.profile=zero3 "),
        ("gpu_out_of_memory", {"deepspeed": {"profile": "zero3"}}, "janus-cluster submit "),
    ],
)  # fmt: skip
def test_what_can_go_on_is_not_begun_anew(tmp_path: Path, kind: Kind, job: dict[str, Any], first: str) -> None:
    failure = Failure(kind=kind)
    steps = next_steps(failure, run=RunDir(tmp_path), ref="7", checkpoint=None, job=job)
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
def test_every_way_to_say_that_memory_ran_out_is_known(words: str, kind: str) -> None:
    assert kind_of_words(words) == kind


REFUSED = "UsageError: /d/train_guide.json.gz: 40 of 60 trajectories (66.7%) have no folder of frames under /d/images"
HINT = "if no more was rendered: --set data.max_absent_fraction=0.67; or name the folder that holds them"


def test_data_that_was_refused_has_the_remedy_of_the_rank_on_the_card(tmp_path: Path) -> None:
    frames = ('File "/x/janus_cluster/training/data/index.py", line 9, in judge_absent',)
    log = f"Traceback (most recent call last):\n{REFUSED}\nhint: {HINT}\n"
    failure = classify(evidence(errors=(error(0, REFUSED, frames=frames),), logs=(("a:0", log),)))
    assert failure is not None and (failure.kind, failure.hint) == ("bad_data", HINT)
    run = RunDir(tmp_path / "demo-1")
    steps = next_steps(failure, run=run, ref="1", checkpoint=None, job={})
    assert steps == [f"janus-cluster submit {run.job_yaml} --set data.max_absent_fraction=0.67", HINT]


def test_one_broken_frame_is_mended_and_the_run_goes_on(tmp_path: Path) -> None:
    failure = Failure(
        kind="bad_data", message="TrainingFailed: /d/a.png: cannot be decoded", path="/d/a.png", hint=HINT
    )
    (step,) = next_steps(failure, run=RunDir(tmp_path), ref="1", checkpoint=None, job={})
    assert step.startswith("mend or take away /d/a.png, then: janus-cluster resume 1")
