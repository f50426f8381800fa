"""Two attempts never write into one run folder: the one that runs holds its lock."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator

from janus_cluster.errors import UsageError
from janus_cluster.node.batch_log import say
from janus_cluster.rundir import RunDir

_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def run_folder_held(run: RunDir, *, job_id: str | None, wait_s: float) -> Iterator[None]:
    """The run folder is this process's inside the block. Where the file system has no locks, nobody is kept out.

    It waits that long for another holder: the process of a requeued job may still be ending on another node. Where that
    one is of the same job, begun again elsewhere, its lock is passed over then: NFS 3 keeps the locks of a dead node
    until it is up again, and should it live after all, it leaves the folder to the newer attempt (node/phases.py).
    Raises: UsageError naming who holds it; nothing in the folder was touched.
    """
    fd = os.open(run.attempt_lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _lock(fd, run, job_id=job_id, wait_s=wait_s)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"job {job_id} on {socket.gethostname()}, process {os.getpid()}".encode(), 0)
        yield
    finally:
        os.close(fd)


def _lock(fd: int, run: RunDir, *, job_id: str | None, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.5)
                continue
            holder = os.pread(fd, 200, 0).decode("utf-8", "replace") or "another attempt"
            if holder.startswith(f"job {job_id} on ") and f" on {socket.gethostname()}," not in holder:
                say(
                    f"{run.attempt_lock} is still held by {holder}: the same job, begun again since, goes on without it"
                )
                return
            raise UsageError(
                f"{run.path} is being written by {holder}: two attempts would spoil each other's checkpoints",
                hint=f"janus-cluster tail {run.name} follows it; is that node down for good: rm {run.attempt_lock}; "
                f"a run of its own: janus-cluster submit {run.job_yaml}",
            ) from None
        except OSError as e:
            if e.errno not in _UNSUPPORTED:
                raise
            say(f"{run.attempt_lock}: no locks on this file system ({e.strerror}); nobody is kept out")
            return
