"""Whether the process of a local job is alive, from /proc."""

from __future__ import annotations

import time
from pathlib import Path

from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.submission import SubmissionRecord

# execve takes well under a millisecond; on a machine with more to do than it can, the process waits for its turn in it.
_EXEC_S = 1.0
_LOOK_S = 0.002


def is_local_job(pid: int, run: RunDir) -> bool:
    """Whether `pid` is alive and the process of this run: its command line names the run folder or a file in it.

    A folder that was moved meanwhile had another path when the process was started.
    """
    proc = Path("/proc") / str(pid)
    try:
        argv = _read_command_line(proc).split(b"\0")
        cwd = (proc / "cwd").readlink()
    except OSError:
        return False
    ours = {run.path.resolve(), *_started_in(run)}
    paths = ((cwd / arg.decode(errors="surrogateescape")).resolve() for arg in argv if b"/" in arg or arg == b".")
    return any(not ours.isdisjoint((path, *path.parents)) for path in paths)


def _started_in(run: RunDir) -> list[Path]:
    """The run folder's path at the last submission."""
    sent = SubmissionRecord.load(run.submission_json)
    if sent is None or not sent.command:
        return []
    # <run>/bundles/<n>/job.sbatch
    return [folder.parent for folder in Path(sent.command[-1]).resolve().parents[1:2] if folder.name == "bundles"]


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
