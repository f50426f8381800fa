"""A step runs one phase once on every node. Only here do Slurm and the local launcher differ."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import IO, Protocol

from janus_cluster.node.batch_log import log_line
from janus_cluster.run.records.submission import Cluster

_GRACE_S = 20.0
_POLL_S = 0.2
# Lines that srun, slurmstepd and each_node.sh write; a task's own lines have no such beginning.
# Source: output of 22.05 to 25.05.
_BY_SLURM = re.compile(
    rb"^(?:\d+: )?((?:(?:srun|slurmstepd)[^:\n]*:|\[[\dT:.-]+\]) (?:error|fatal|Job .* step creation).*"
    rb"|setup on \S+: environment\.setup_each_node: .*)"
)
_MOST_MESSAGES = 3
# For a pipe's last lines; another process that inherited it may hold it open.
_DRAIN_S = 2.0


class LauncherMessages:
    """Copies what srun writes to stderr into this process's, and keeps its last error messages."""

    def __init__(self, pipe: IO[bytes] | None) -> None:
        self._found: deque[bytes] = deque(maxlen=_MOST_MESSAGES)
        self._last_line = b""
        self._thread = threading.Thread(target=self._copy, args=(pipe,), daemon=True)
        self._thread.start()

    def _copy(self, pipe: IO[bytes] | None) -> None:
        if pipe is None:
            return
        with pipe:
            for line in pipe:
                # A full disk must not end srun through a closed pipe.
                with contextlib.suppress(OSError):
                    os.write(2, line)
                self._last_line = line if line.strip() else self._last_line
                if found := _BY_SLURM.match(line):
                    self._found.append(found[1])

    def last(self) -> tuple[str, ...]:
        """The last error messages, once srun has ended; without any the last line, of whatever program."""
        self._thread.join(_DRAIN_S)
        lines = (line.decode("utf-8", errors="replace").strip() for line in [*self._found] or [self._last_line])
        return tuple(dict.fromkeys(line for line in lines if line))


class PhaseProcesses:
    """The running processes of one phase: one srun, or one process per simulated node."""

    def __init__(
        self,
        processes: Sequence[subprocess.Popen[bytes]],
        *,
        end_together: bool,
        ending: signal.Signals = signal.SIGTERM,
        grace_s: float = _GRACE_S,
        messages: LauncherMessages | None = None,
    ) -> None:
        """`ending` asks the processes to end; they have `grace_s` for it, and as long again after SIGKILL.

        `messages`: of the program that starts the tasks, where there is one.
        """
        self._processes = list(processes)
        self._end_together = end_together
        self._ending = ending
        self._grace_s = grace_s
        self._left_behind: list[subprocess.Popen[bytes]] = []
        self._messages = messages

    def launcher_messages(self) -> tuple[str, ...]:
        """The error messages of the launching program; call it after `wait`."""
        return self._messages.last() if self._messages else ()

    def wait(self, *, timeout_s: float | None, on_wait: Callable[[PhaseProcesses], None]) -> int:
        """Wait for all processes. Returns: the worst exit code; past the limit they are ended and 124 is returned.

        `on_wait` is called several times a second, so that a heartbeat or a stop request can be served.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while any(p.poll() is None for p in self._processes if p not in self._left_behind):
            if deadline is not None and time.monotonic() > deadline:
                self.terminate()
                return 124
            if self._end_together and any(p.poll() for p in self._processes):
                self.terminate()
                break
            on_wait(self)
            time.sleep(_POLL_S)
        codes = [-signal.SIGKILL if p.returncode is None else p.returncode for p in self._processes]
        first_bad = next((c for c in codes if c > 0), None) or next((c for c in codes if c), 0)
        return first_bad if first_bad >= 0 else 128 - first_bad

    def terminate(self) -> None:
        """End every process: asked first, killed after a grace period.

        One that SIGKILL does not end is left behind: it hangs in the kernel, in a driver or on a file system, and
        waiting
        for it would hold the allocation until the walltime.
        """
        running = [p for p in self._processes if p not in self._left_behind and p.poll() is None]
        for p in running:
            p.send_signal(self._ending)
        slow = _still_running(running, limit_s=self._grace_s)
        for p in slow:
            p.kill()
        for p in _still_running(slow, limit_s=self._grace_s):
            log_line(f"process {p.pid} cannot be killed (it hangs in the kernel) and is left behind")
            self._left_behind.append(p)


def _still_running(processes: Sequence[subprocess.Popen[bytes]], *, limit_s: float) -> list[subprocess.Popen[bytes]]:
    """Those that have not ended within the limit."""
    deadline = time.monotonic() + limit_s
    for p in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            p.wait(max(0.1, deadline - time.monotonic()))
    return [p for p in processes if p.poll() is None]


class Launcher(Protocol):
    """How one allocation runs a command once per node."""

    @property
    def cluster(self) -> Cluster: ...

    @property
    def job_id(self) -> str | None: ...

    @property
    def nodes(self) -> tuple[str, ...]: ...

    def master_addr(self) -> str:
        """A name or address of node 0 that every node can reach."""
        ...

    def is_ended_by_slurm(self) -> bool:
        """Whether the job was cancelled, or its nodes taken, so that a requeue would bring back what was to end."""
        ...

    def requeue(self) -> str | None:
        """Requeue the job; or return the reason why it could not be."""
        ...

    def requeue_without(self, exclude: Sequence[str]) -> str | None:
        """Requeue the job without the nodes in `exclude`; or return the reason why it could not be."""
        ...

    def start(self, task_argv: Sequence[str], *, end_together: bool) -> PhaseProcesses:
        """Start `task_argv` once on every node. With `end_together` one failure ends all."""
        ...
