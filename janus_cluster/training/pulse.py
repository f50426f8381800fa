"""A thread beside training: it takes this rank's signals, and tells every few seconds that the rank is alive.

Signals are waited for, not handled: a handler of Python's runs only between bytecodes, and a rank spends its time in
collectives. What they mean depends on who sent them. torchrun ends the ranks of a node when one has failed: the process
ends at once. Anybody else (Slurm before the walltime or at a preemption, a user) asks to stop: the ranks agree on a
step boundary, save, and leave.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path

from janus_cluster.rundir import RunDir, name_of_trouble, write_json_atomically

STOP_SIGNALS = frozenset({signal.SIGUSR1, signal.SIGTERM})
_TAKEN = STOP_SIGNALS | {signal.SIGINT}
_LONGEST_INTERVAL_S = 10.0
_POLL_S = 0.1
_PR_SET_PDEATHSIG = 1
# Where only whole files would tell of progress: a rank's share of a 7B model's checkpoint is one of 7 GB.
_WRITES = frozenset({"checkpoint", "export"})
_PROGRESS_BYTES = 1 << 20


def take_signals() -> None:
    """Threads that begin after this call leave the signals of Pulse alone; a dead torchrun takes this process along.

    Call it first: a library's thread that began before could be the one that a signal ends the process in.
    """
    # A rank under SIGSTOP, or one whose agent was killed, would otherwise stay behind and keep its GPU.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, _TAKEN)
    for signum in _TAKEN:
        # node.task ignores them, so that torchrun does, and what is ignored would never arrive here.
        signal.signal(signum, signal.SIG_DFL)


class Pulse:
    """This rank's heartbeat file, and the first stop signal that came to this process.

    The training thread calls `beat` whenever it gets on; a rank whose thread stands still in a collective keeps telling
    that its process lives, so that the one which does not is found.
    """

    def __init__(self, run: RunDir, *, attempt: int, rank: int, node: str, hang_timeout_s: float) -> None:
        self._path = run.heartbeat_json(attempt, rank)
        # The attempt runs on rank 0's node, and tells it there.
        self._stop_json = run.stop_json(attempt) if rank == 0 else None
        self._who = {"schema_version": 1, "rank": rank, "node": node, "pid": os.getpid()}
        self._hang_timeout_s = hang_timeout_s
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
        """An optimizer step is completed. After the first one the file tells so at once: what follows may not live."""
        if not self._has_stepped:
            self._has_stepped = True
            self._write()

    def is_asked_to_stop(self) -> bool:
        """A signal came to this process, or the attempt's file tells rank 0. One look at a file at most."""
        return self.stop_signal is not None or (self._stop_json is not None and self._stop_json.exists())

    def _run(self) -> None:
        said_stuck = -1
        while True:
            self._count_written()
            self._write()
            info = wait_for_signal(self._interval_s)
            if info is not None:
                self._take(info.si_signo, sender=info.si_pid)
            is_stuck = self._has_begun and time.monotonic() - self._changed_s >= self._hang_timeout_s
            if is_stuck and said_stuck != self._count:
                said_stuck = self._count
                _say(f"no progress in {self._hang_timeout_s:.0f} s ({self._doing}, step {self._step}); the stacks:")
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)

    def _take(self, signum: int, *, sender: int) -> None:
        if sender == os.getppid() or signum not in STOP_SIGNALS:
            # Not sys.exit: the training thread may sit in a collective that never ends.
            os._exit(128 + signum)
        if self.stop_signal is None:
            self.stop_signal = signum
            _say(f"{signal.Signals(signum).name}: asked to stop at the next step boundary")

    def _count_written(self) -> None:
        """What this process writes while it saves is progress: on a slow file system one file may take an hour."""
        written_bytes = read_written_bytes() if self._doing in _WRITES else None
        if written_bytes is not None and written_bytes - self._written_bytes >= _PROGRESS_BYTES:
            self._written_bytes = written_bytes
            self._count += 1
            self._changed_s = time.monotonic()

    def _write(self) -> None:
        value = {"doing": self._doing, "step": self._step, "has_begun": self._has_begun}
        value |= {"has_stepped": self._has_stepped}
        value |= {"count": self._count, "time": time.time()}
        try:
            write_json_atomically(self._path, self._who | value)
            self._trouble = ""
        except OSError as error:
            # A full disk must not end the training that could still be saved elsewhere.
            if self._trouble != (trouble := name_of_trouble(error)):
                self._trouble = trouble
                _say(f"{self._path}: {trouble}")


def wait_for_signal(limit_s: float) -> signal.struct_siginfo | None:
    """A signal of ours that came to this process, or None after `limit_s`.

    Not sigtimedwait's own limit: after a stop and a continue meanwhile (a suspended job) it returns, in Python 3.11, a
    signal that never came, with whatever lay in memory for its number.
    """
    deadline = time.monotonic() + limit_s
    while (info := signal.sigtimedwait(_TAKEN, 0)) is None and time.monotonic() < deadline:
        time.sleep(min(_POLL_S, limit_s))
    return info


def read_written_bytes() -> int | None:
    """How much this process has given to write() so far; None where the kernel does not tell."""
    try:
        rows = (line.split() for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines())
        return int(dict(rows)["wchar:"])
    except (OSError, ValueError, KeyError):
        return None


def _say(line: str) -> None:
    """The line is in the log, if that can be written: a full disk must not end the thread that takes signals."""
    with contextlib.suppress(OSError):
        print(line, flush=True)
