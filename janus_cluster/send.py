"""Hand a run folder over to Slurm or to this machine, so that afterwards it is submitted and recorded, or it is not.

Between sbatch's acceptance and our record lies a moment in which a Ctrl-C would leave a job that nobody knows of.
Signals that end a program are held back meanwhile; sbatch runs in a session of its own, where none reaches it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from janus_cluster.errors import JanusError, UsageError
from janus_cluster.rundir import RunDir, read_json, write_text_atomically

Cluster = Literal["slurm", "sandbox", "local"]

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_WATCH_S = 0.05


@contextlib.contextmanager
def signals_held(waiting_for: str) -> Iterator[list[int]]:
    """What is inside runs to its end; a signal that came meanwhile is delivered afterwards. Yields: those that came."""
    came: list[int] = []
    # While something is sent, sys.stderr collects submitit's messages.
    stderr = sys.stderr
    if threading.current_thread() is not threading.main_thread():
        # Python delivers signals to the main thread only.
        yield came
        return

    def note(signum: int, _frame: FrameType | None = None) -> None:
        came.append(signum)
        print(f"one moment: {waiting_for}", file=stderr, flush=True)

    # Threads that a library started before do not block them, hence the handlers; who presses Ctrl-C is answered at
    # once, hence the watch.
    before = {signum: signal.signal(signum, note) for signum in _ENDING}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    is_over = threading.Event()
    watch = threading.Thread(target=_watch_signals, args=(note, is_over), daemon=True)
    watch.start()
    try:
        yield came
    finally:
        is_over.set()
        watch.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for signum, handler in before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        for number in dict.fromkeys(came):
            signal.raise_signal(number)


def _watch_signals(note: Callable[[int], None], is_over: threading.Event) -> None:
    # Not sigtimedwait's own limit: stopped and continued meanwhile (Ctrl-Z), it returns a signal that never came.
    while not is_over.wait(_WATCH_S):
        if (info := signal.sigtimedwait(_ENDING, 0)) is not None:
            note(info.si_signo)


@contextlib.contextmanager
def run_locked(run: RunDir) -> Iterator[None]:
    """No other submit or resume sends this run meanwhile. Raises: UsageError while one does."""
    try:
        fd = os.open(run.submit_lock, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as e:
        raise UsageError(f"{run.path} cannot be written: {e.strerror or e}", hint="is it yours?") from e
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UsageError(
                f"another janus-cluster is sending {run.name} at this moment", hint=f"janus-cluster status {run.name}"
            ) from e
        except OSError:
            # No locks on this file system; what is live is asked of Slurm all the same.
            pass
        yield
    finally:
        os.close(fd)


def send(run: RunDir, cluster: Cluster, *, slurm_conf: Path | None, options: Sequence[str] = ()) -> str:
    """The run is queued or running, and submission.json says where; earlier submissions are its history.

    Call it with signals held. Returns: the job id.
    Raises:  SubmitFailed, SlurmUnavailable; JanusError where it could not be recorded: the job was then cancelled.
    """
    log_bytes = run.batch_log.stat().st_size if run.batch_log.exists() else 0
    if cluster == "local":
        from janus_cluster.local.submit import local_command, submit_local

        command = local_command(run)
        job_id = submit_local(run)
    else:
        from janus_cluster.slurm.executor import sbatch_command, submit_run

        command = sbatch_command(run, options)
        job_id = submit_run(run, slurm_conf=slurm_conf, options=options)
    record: dict[str, Any] = {
        "schema_version": 1,
        "cluster": cluster,
        "job_id": job_id,
        "command": command,
        "submitted_at": time.time(),
        "slurm_conf": str(slurm_conf) if slurm_conf else None,
        "batch_log_bytes": log_bytes,
        "history": load_history(run),
    }
    try:
        _write_record(run, record)
    except OSError as e:
        _take_back(job_id, slurm_conf)
        raise JanusError(f"job {job_id} was cancelled: {run.submission_json} could not be written ({e})") from e
    return job_id


def load_history(run: RunDir) -> list[dict[str, Any]]:
    """Every submission of the run so far, the first one first."""
    try:
        value = read_json(run.submission_json)
        earlier = value.pop("history", [])
    except (OSError, ValueError, AttributeError):
        return []
    return [*(earlier if isinstance(earlier, list) else []), value]


def _write_record(run: RunDir, record: dict[str, Any]) -> None:
    import json

    write_text_atomically(run.submission_json, json.dumps(record, indent=2, ensure_ascii=False) + "\n", mode=0o600)


def _take_back(job_id: str, slurm_conf: Path | None) -> None:
    if job_id.startswith("local-"):
        os.killpg(int(job_id.removeprefix("local-")), signal.SIGTERM)
        return
    from janus_cluster.slurm.commands import Slurm

    Slurm(conf=slurm_conf).scancel(job_id)
