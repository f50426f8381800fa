"""Locks between processes: one file each, held until its descriptor is closed or the process ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_POLL_S = 0.1


@contextlib.contextmanager
def open_lock(path: Path) -> Iterator[int]:
    """The lock's file, for `take_lock`; leaving the block gives the lock back. Raises: OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def take_lock(fd: int, *, wait_s: float = 0.0) -> str | None:
    """Lock the file for this process until `fd` is closed. Waits up to `wait_s` for another holder.

    Returns: None; where the file system has no locks (some NFS), the reason, and the file is not locked.
    Raises:  BlockingIOError where another process still holds it; OSError.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_POLL_S)
        except OSError as e:
            if e.errno not in _UNSUPPORTED:
                raise
            return e.strerror
