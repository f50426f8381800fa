"""A thread beside training that receives this rank's signals and writes a heartbeat every few seconds.

Signals are waited for, not handled: a handler of Python's runs only between bytecodes, and a rank spends its time in
collectives. Their meaning depends on the sender. torchrun ends the ranks of a node when one has failed: the process
ends at once. Any other sender (Slurm before the walltime or at a preemption, a user) requests a stop: the ranks agree
on a step boundary, save, and leave.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Protocol

from janus_cluster.run.files import name_of_trouble
from janus_cluster.run.parent import end_with_parent
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.attempt import HeartbeatRecord

STOP_SIGNALS = frozenset({signal.SIGUSR1, signal.SIGTERM})
_TAKEN = STOP_SIGNALS | {signal.SIGINT}
_LONGEST_INTERVAL_S = 10.0
_POLL_S = 0.1
# A wait for a signal that took so many intervals: this process was suspended.
_MISSED_WAITS = 3
# Where only whole files would show progress: a rank's share of a 7B model's checkpoint is one of 7 GB.
_WRITES = frozenset({"checkpoint", "export"})
_PROGRESS_BYTES = 1 << 20


class Stalled(Protocol):
    """What writes down where this rank is while training makes no progress."""

    def write(self, *, doing: str, step: int, count: int) -> None: ...


def take_signals() -> None:
    """Threads that begin after this call leave the signals of Pulse alone; a dead torchrun takes this process along.

    Call it first: a library's thread that began before could be the one that a signal ends the process in.
    """
    # A rank under SIGSTOP, or one whose agent was killed, would otherwise be left behind and keep its GPU.
    end_with_parent(os.getppid())
    signal.pthread_sigmask(signal.SIG_BLOCK, _TAKEN)
    for signum in _TAKEN:
        # node.task ignores them, so that torchrun does, and what is ignored would never arrive here.
        signal.signal(signum, signal.SIG_DFL)


class Pulse:
    """This rank's heartbeat file, and the first stop signal that this process received.

    The training thread calls `beat` at every step of its work; a rank whose thread hangs in a collective keeps
    reporting that its process is alive, so that the one which does not is found.
    """

    def __init__(
        self,
        run: RunDir,
        *,
        attempt: int,
        rank: int,
        node: str,
        hang_timeout_s: float,
        stalled: Stalled | None = None,
        stalled_after_s: float = float("inf"),
    ) -> None:
        """stalled: written from `stalled_after_s` without progress on, at every heartbeat; before the attempt ends."""
        self._path = run.heartbeat_json(attempt, rank)
        # The attempt runs on rank 0's node, and writes the request there.
        self._stop_json = run.stop_json(attempt) if rank == 0 else None
        self._rank, self._node = rank, node
        self._hang_timeout_s = hang_timeout_s
        self._stalled, self._stalled_after_s = stalled, stalled_after_s
        self._interval_s = min(_LONGEST_INTERVAL_S, hang_timeout_s / 4)
        self._doing, self._step, self._count = "start", 0, 0
        self._has_begun = self._has_stepped = False
        self._changed_s = time.monotonic()
        self._written_bytes, self._trouble = 0, ""
        self.stop_signal: int | None = None

    def start(self) -> Pulse:
        """The thread runs until the process ends."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        threading.Thread(target=self._run, name="pulse", daemon=True).start()
        return self

    def beat(self, doing: str, step: int) -> None:
        """Training has got on: it is now `doing` something for that optimizer step. Costs no system call.

        "step" is past the reduction over all ranks that a step begins with.
        """
        self._doing, self._step = doing, step
        self._has_begun = self._has_begun or doing == "step"
        self._count += 1
        self._changed_s = time.monotonic()

    def step_done(self) -> None:
        """An optimizer step is completed. After the first one the file is written at once."""
        if not self._has_stepped:
            self._has_stepped = True
            self._write()

    def is_asked_to_stop(self) -> bool:
        """This process received a signal, or rank 0 found the attempt's file. Reads one file at most."""
        return self.stop_signal is not None or (self._stop_json is not None and self._stop_json.exists())

    def _run(self) -> None:
        reported_stuck = -1
        while True:
            self._count_written()
            self._write()
            self._write_stalled()
            waited_since_s = time.monotonic()
            info = wait_for_signal(self._interval_s)
            self._leave_out_suspension(time.monotonic() - waited_since_s)
            if info is not None:
                self._take(info.si_signo, sender=info.si_pid)
            is_stuck = self._has_begun and time.monotonic() - self._changed_s >= self._hang_timeout_s
            if is_stuck and reported_stuck != self._count:
                reported_stuck = self._count
                _print(f"no progress in {self._hang_timeout_s:.0f} s ({self._doing}, step {self._step}); the stacks:")
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)

    def _leave_out_suspension(self, waited_s: float) -> None:
        """Time in which Slurm had suspended the job is no time without progress."""
        if waited_s > _MISSED_WAITS * self._interval_s:
            self._changed_s += waited_s

    def _write_stalled(self) -> None:
        """Not when the attempt asks: over NFS a rank may see the request a minute later."""
        if self._stalled is None or time.monotonic() - self._changed_s < self._stalled_after_s:
            return
        try:
            self._stalled.write(doing=self._doing, step=self._step, count=self._count)
        except Exception as error:
            # It reads private parts of torch, of many versions: without it the hang is found all the same.
            _print(f"what this rank waits in is not known ({type(error).__name__}: {error})")
            self._stalled = None

    def _take(self, signum: int, *, sender: int) -> None:
        if sender == os.getppid() or signum not in STOP_SIGNALS:
            # Not sys.exit: the training thread may sit in a collective that never ends.
            os._exit(128 + signum)
        if self.stop_signal is None:
            self.stop_signal = signum
            _print(f"{signal.Signals(signum).name}: asked to stop at the next step boundary")

    def _count_written(self) -> None:
        """What this process writes while it saves is progress: on a slow file system one file may take an hour."""
        written_bytes = read_written_bytes() if self._doing in _WRITES else None
        if written_bytes is not None and written_bytes - self._written_bytes >= _PROGRESS_BYTES:
            self._written_bytes = written_bytes
            self._count += 1
            self._changed_s = time.monotonic()

    def _write(self) -> None:
        record = HeartbeatRecord(
            rank=self._rank,
            node=self._node,
            pid=os.getpid(),
            doing=self._doing,
            step=self._step,
            has_begun=self._has_begun,
            has_stepped=self._has_stepped,
            count=self._count,
            time=time.time(),
        )
        try:
            record.write(self._path)
            self._trouble = ""
        except OSError as error:
            # A full disk must not end the training that could still be saved elsewhere.
            if self._trouble != (trouble := name_of_trouble(error)):
                self._trouble = trouble
                _print(f"{self._path}: {trouble}")


def wait_for_signal(limit_s: float) -> signal.struct_siginfo | None:
    """A stop signal that this process received, or None after `limit_s`.

    Not sigtimedwait's own limit: after a stop and a continue meanwhile (a suspended job) it returns, in Python 3.11, a
    signal that was never sent, with an undefined number.
    """
    deadline = time.monotonic() + limit_s
    while (info := signal.sigtimedwait(_TAKEN, 0)) is None and time.monotonic() < deadline:
        time.sleep(min(_POLL_S, limit_s))
    return info


def read_written_bytes() -> int | None:
    """How much this process has given to write() so far; None where the kernel does not report it."""
    try:
        rows = (line.split() for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines())
        return int(dict(rows)["wchar:"])
    except (OSError, ValueError, KeyError):
        return None


def _print(line: str) -> None:
    """The line is in the log, if that can be written: a full disk must not end the thread that takes signals."""
    with contextlib.suppress(OSError):
        print(line, flush=True)
