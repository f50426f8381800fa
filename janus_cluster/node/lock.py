"""One attempt at a time writes into a run folder: it holds the folder's lock."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

from janus_cluster.errors import UsageError
from janus_cluster.node.batch_log import log_line
from janus_cluster.run.lock import open_lock, take_lock
from janus_cluster.run.next_command import command_for, submit_command
from janus_cluster.run.paths import RunDir


@contextlib.contextmanager
def run_folder_held(run: RunDir, *, job_id: str | None, wait_s: float) -> Iterator[None]:
    """Hold the run folder's lock inside the block. Where the file system has no locks, none is taken.

    Waits up to `wait_s` for another holder: the process of a requeued job may still be ending on another node. If that
    holder is the same job, started again elsewhere, its lock is then ignored: NFS 3 keeps the locks of a dead node
    until it is up again, and a holder that is still alive yields to the newer attempt (node/phases.py).
    Raises: UsageError naming who holds it; nothing in the folder was touched.
    """
    with open_lock(run.attempt_lock) as fd:
        try:
            unsupported = take_lock(fd, wait_s=wait_s)
        except BlockingIOError:
            holder = os.pread(fd, 200, 0).decode("utf-8", "replace") or "another attempt"
            if not holder.startswith(f"job {job_id} on ") or f" on {socket.gethostname()}," in holder:
                raise UsageError(
                    f"{run.path} is being written by {holder}: two attempts would spoil each other's checkpoints",
                    hint=f"{command_for('tail', run)} follows it; is that node down for good: "
                    f"rm {run.attempt_lock}; a run of its own: {submit_command(run)}",
                ) from None
            log_line(
                f"{run.attempt_lock} is still held by {holder}, the same job started earlier; continuing without it"
            )
        else:
            if unsupported is not None:
                log_line(f"{run.attempt_lock}: no locks on this file system ({unsupported}); continuing without one")
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"job {job_id} on {socket.gethostname()}, process {os.getpid()}".encode(), 0)
        yield
