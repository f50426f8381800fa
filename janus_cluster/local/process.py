"""Whether the process of a local job lives, from /proc."""

from __future__ import annotations

import time
from pathlib import Path

from janus_cluster.rundir import RunDir

# execve takes well under a millisecond; on a machine with more to do than it can, the process waits for its turn in it.
_EXEC_S = 1.0
_LOOK_S = 0.002


def is_local_job(pid: int, run: RunDir) -> bool:
    """Whether `pid` lives and is the process of this run: its command line names the run folder or a file in it."""
    proc = Path("/proc") / str(pid)
    try:
        argv = _read_command_line(proc).split(b"\0")
        cwd = (proc / "cwd").readlink()
    except OSError:
        return False
    ours = run.path.resolve()
    paths = ((cwd / arg.decode(errors="surrogateescape")).resolve() for arg in argv if b"/" in arg or arg == b".")
    return any(path == ours or ours in path.parents for path in paths)


def _read_command_line(proc: Path) -> bytes:
    """The command line of a process; empty for a zombie, which counts as dead.

    While a process becomes another program (execve), the kernel has none of it for a moment: 4 % of the looks right
    after a start, on a loaded machine. So an empty one is read again, unless the process has ended.
    """
    deadline = time.monotonic() + _EXEC_S
    while True:
        line = (proc / "cmdline").read_bytes()
        state = (proc / "stat").read_bytes().rpartition(b") ")[2][:1]
        if line or state in (b"Z", b"X") or time.monotonic() > deadline:
            return line
        time.sleep(_LOOK_S)
