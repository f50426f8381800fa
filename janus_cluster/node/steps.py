"""A step runs one phase once on every node. Slurm and the local launcher differ here and nowhere else."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from janus_cluster.node.batch_log import say

_GRACE_S = 20.0
_POLL_S = 0.2


class Step:
    """The running processes of one phase: one srun, or one process per simulated node."""

    def __init__(
        self,
        processes: Sequence[subprocess.Popen[bytes]],
        *,
        end_together: bool,
        ending: signal.Signals = signal.SIGTERM,
        grace_s: float = _GRACE_S,
    ) -> None:
        """`ending` asks the processes to end; they have `grace_s` for it, and as long again once they are killed."""
        self._processes = list(processes)
        self._end_together = end_together
        self._ending = ending
        self._grace_s = grace_s
        self._left_behind: list[subprocess.Popen[bytes]] = []

    def wait(self, *, timeout_s: float | None, on_wait: Callable[[Step], None]) -> int:
        """The worst exit code after all have ended; past the limit they are ended and 124 is returned.

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
        """Every process has ended: asked first, killed after a grace period.

        One that not even that ends is left behind: it hangs in the kernel, in a driver or on a file system that does
        not answer, and waiting for it would hold the allocation until the walltime.
        """
        running = [p for p in self._processes if p not in self._left_behind and p.poll() is None]
        for p in running:
            p.send_signal(self._ending)
        slow = _still_running(running, limit_s=self._grace_s)
        for p in slow:
            p.kill()
        for p in _still_running(slow, limit_s=self._grace_s):
            say(f"process {p.pid} cannot be killed (it hangs in the kernel) and is left behind")
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
    def cluster(self) -> str: ...

    @property
    def job_id(self) -> str | None: ...

    @property
    def nodes(self) -> tuple[str, ...]: ...

    def master_addr(self) -> str:
        """A name or address of node 0 that every node can reach."""
        ...

    def requeue(self) -> str | None:
        """The job is back in the queue; or the reason why it could not be."""
        ...

    def requeue_without(self, exclude: Sequence[str]) -> str | None:
        """The job is back in the queue and keeps away from `exclude`; or the reason why it could not be."""
        ...

    def start(self, task_argv: Sequence[str], *, end_together: bool) -> Step:
        """`task_argv` is running once on every node. With `end_together` one failure ends all."""
        ...
