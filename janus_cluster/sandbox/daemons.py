"""Starting daemons, knowing them again later, and ending exactly those."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from janus_cluster.errors import SandboxFailed
from janus_cluster.sandbox.programs import find_program
from janus_cluster.sandbox.state import Daemon

_POLL_S = 0.02
_DAEMONS = frozenset({"slurmctld", "slurmd", "slurmdbd", "munged"})


def boot_id() -> str:
    """Different after every start of this machine; pids and ticks of another boot mean nothing."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def parse_start_ticks(stat: str) -> int | None:
    """Field 22 of /proc/<pid>/stat, or None for a process that has ended but was not yet collected.

    The command in field 2 may hold spaces and brackets, so fields are counted from its last bracket.
    """
    fields = stat[stat.rindex(")") + 1 :].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


def read_start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None if there is no such process."""
    try:
        return parse_start_ticks(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, IndexError):
        return None


def read_command_name(pid: int) -> str | None:
    """The name of the program that the process runs now (15 characters at most); None if it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def is_alive(daemon: Daemon) -> bool:
    """Whether the very process that we started still runs."""
    return read_start_ticks(daemon.pid) == daemon.start_ticks


def start_daemon(name: str, argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, output: Path) -> Daemon:
    """The program runs in a session of its own, what it prints appended to `output`; it outlives this process.

    posix_spawn and not Popen: the child is not waited for, and Popen warns about that.
    """
    program = [find_program("env"), f"--chdir={cwd}", find_program(argv[0]), *argv[1:]]
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(output), append, 0o644),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    pid = os.posix_spawn(program[0], program, dict(env), file_actions=actions, setsid=True)
    ticks = read_start_ticks(pid)
    if ticks is None:
        raise SandboxFailed(f"{name} ended at once:\n{tail(output)}")
    return Daemon(name=name, pid=pid, start_ticks=ticks)


def end_daemons(daemons: Iterable[Daemon], *, grace_s: float = 5) -> None:
    """None of them runs any more: asked with SIGTERM, and after grace_s made to with SIGKILL.

    Raises:  SandboxFailed if one survives SIGKILL for 5 s.
    """
    left = [d for d in daemons if is_alive(d)]
    for signal_number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
        for daemon in left:
            signal_daemon(daemon, signal_number)
        deadline = time.monotonic() + wait_s
        while left and time.monotonic() < deadline:
            left = [d for d in left if _still_runs(d)]
            time.sleep(_POLL_S if left else 0)
    if left:
        names = ", ".join(f"{d.name} (pid {d.pid})" for d in left)
        raise SandboxFailed(f"these do not end, not even by SIGKILL: {names}")


def signal_daemon(daemon: Daemon, signal_number: signal.Signals) -> None:
    """The daemon, if it still is the one we started, has got the signal."""
    if is_alive(daemon):
        try:
            os.kill(daemon.pid, signal_number)
        except ProcessLookupError:
            return


def _still_runs(daemon: Daemon) -> bool:
    if is_alive(daemon):
        return True
    try:
        # Collect it where it is our own child; where another command started it, init does.
        os.waitpid(daemon.pid, os.WNOHANG)
    except ChildProcessError:
        return False
    return False


def as_daemons(pids: Iterable[int]) -> list[Daemon]:
    """Each pid that runs now, with its start: what is ended later is what was looked at now."""
    found = ((pid, read_start_ticks(pid)) for pid in pids)
    return [Daemon(f"process {pid}", pid, ticks) for pid, ticks in found if ticks is not None]


def find_job_pids(slurm_conf: Path, spool: Path) -> list[int]:
    """Pids of this sandbox's jobs and slurmstepds on this machine's own network, sorted.

    A job's process has this slurm.conf *and* a node in its environment: a user's shell that exported SLURM_CONF, or
    that salloc opened, has no SLURMD_NODENAME and is left alone. slurmstepd overwrites its environment with its title,
    and is known by the socket that it listens on in the spool folder.
    """
    conf = f"SLURM_CONF={slurm_conf}".encode()
    sockets = _listening_inodes(spool)
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            in_job = conf in variables and any(v.startswith(b"SLURMD_NODENAME=") for v in variables)
            if in_job or (sockets and _is_stepd_of(folder, sockets)):
                found.append(int(folder.name))
        except OSError:
            continue
    return sorted(found)


def find_slurm_pids(slurm_conf: Path) -> list[int]:
    """Pids of Slurm's daemons and their munged that were started with this slurm.conf, sorted."""
    conf = f"SLURM_CONF={slurm_conf}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            is_one = (folder / "comm").read_text(encoding="ascii", errors="replace").strip() in _DAEMONS
            if is_one and conf in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return sorted(found)


def parse_unix_sockets(text: str, folder: Path) -> set[str]:
    """Inodes of the sockets in /proc/net/unix whose path is in `folder`."""
    rows = (line.split(maxsplit=7) for line in text.splitlines()[1:])
    return {row[6] for row in rows if len(row) == 8 and Path(row[7]).is_relative_to(folder)}


def _listening_inodes(folder: Path) -> set[str]:
    text = Path("/proc/net/unix").read_text(encoding="utf-8", errors="surrogateescape")
    return parse_unix_sockets(text, folder)


def _is_stepd_of(process: Path, inodes: set[str]) -> bool:
    if (process / "exe").readlink().name != "slurmstepd":
        return False
    targets = {str(fd.readlink()) for fd in (process / "fd").iterdir()}
    return any(f"socket:[{inode}]" in targets for inode in inodes)


def tail(log: Path, *, num_lines: int = 15) -> str:
    """The last lines of a log, indented; of the `.out` beside it if the log is missing or empty."""
    for path in (log, log.with_suffix(".out")):
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:]
        except OSError:
            continue
        if lines:
            return "\n".join([f"  {path}:", *(f"    {line}" for line in lines)])
    return f"  (nothing in {log})"
