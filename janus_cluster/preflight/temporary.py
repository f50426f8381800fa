"""Whether the temporary folder can hold multiprocessing's Unix sockets, executable files, and enough data.

Each is tried: a long path refuses sockets, noexec refuses what triton and DeepSpeed compile, and some file systems have
no sockets at all.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import socket
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from janus_cluster.preflight.limits import GIB
from janus_cluster.preflight.model import Check
from janus_cluster.run.records.verdict import CheckResult

# In the order in which Python looks them up.
_VARIABLES = ("TMPDIR", "TEMP", "TMP")
_DEFAULT = "/tmp"
# Where a private folder may be made in place of one that cannot be used. The last one is memory, often without exec.
_INSTEAD = ("/tmp", "/var/tmp", "/dev/shm")
# multiprocessing makes $TMPDIR/pymp-XXXXXXXX/listener-XXXXXXXX; torch's and triton's names are no longer.
_FOLDER_PREFIX, _SOCKET_NAME = "pymp-", "listener-12345678"


def temporary_folder(environ: Mapping[str, str]) -> str:
    """The folder that a process with these variables takes."""
    return next((environ[name] for name in _VARIABLES if environ.get(name)), _DEFAULT)


def read_temporary(environ: Mapping[str, str], *, instead: Sequence[str] = _INSTEAD) -> list[dict[str, Any]]:
    """Facts of the temporary folder, and of others until one serves: {path, faults: {need: reason}, free_bytes}."""
    first = temporary_folder(environ)
    tried: list[dict[str, Any]] = []
    for path in (first, *(p for p in instead if p != first)):
        tried.append(_try(path))
        if not tried[-1]["faults"]:
            break
    return tried


def choose_temporary(tried: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The first folder that serves; else the first with sockets, which every loader needs; None where none has them."""
    sound = [fact for fact in tried if not fact["faults"]]
    return next(iter(sound or [fact for fact in tried if "socket" not in fact["faults"]]), None)


def describe_faults(fact: Mapping[str, Any]) -> str:
    """What the folder cannot hold, in a line; "" where it can hold everything."""
    return "; ".join(fact["faults"].values())


def judge_temporary(
    tried: Sequence[dict[str, Any]], threshold: Mapping[str, Any], *, node: str, compiles: bool
) -> CheckResult:
    """WARN where ranks get another folder; FAIL where no folder serves, or the one they get is full.

    compiles: whether the ranks run what they compile (GPUs); without, a folder for sockets is enough.
    """
    floor = threshold["fail_below"]
    expected = f"a Unix socket, an executable mapping, fail below {floor:g} GiB free"
    check = Check(id="limits.tmp", node=node, expected=expected, source=threshold["source"], unit="GiB")
    own, chosen = tried[0], choose_temporary(tried)
    fault = f"{own['path']}: {describe_faults(own)}"
    fix = (
        f"on {node}: findmnt -T {own['path']}; "
        "--set environment.variables.TMPDIR=DIR names another folder: a short path, not mounted noexec"
    )
    if chosen is None or (compiles and "exec" in chosen["faults"]):
        others = ", ".join(fact["path"] for fact in tried[1:])
        return check.judged("FAIL", fault + (f"; nor does {others} serve" if others else ""), fix=fix)
    free_gib = chosen["free_bytes"] / GIB
    if free_gib < floor:
        full = f"on {node}: df -h {chosen['path']}; make room, or --set environment.variables.TMPDIR=DIR"
        return check.judged("FAIL", f"{chosen['path']}: {free_gib:.3g} GiB free", fix=full)
    if chosen is not own:
        warning = f"{fault}; the ranks get a private folder in {chosen['path']}, {free_gib:.3g} GiB free"
        return check.judged("WARN", warning, fix=fix)
    if own["faults"]:
        return check.judged("WARN", fault, fix=fix)
    return check.judged("PASS", f"{own['path']}: {free_gib:.3g} GiB free")


def _try(path: str) -> dict[str, Any]:
    """Everything that is made in the folder for it is removed again."""
    fact: dict[str, Any] = {"path": path, "faults": {}, "free_bytes": 0}
    try:
        room = os.statvfs(path)
        fact["free_bytes"] = room.f_bavail * room.f_frsize
        folder = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX, dir=path))
    except OSError as error:
        fact["faults"]["socket"] = f"no folder can be made there: {error.strerror or error}"
        return fact
    try:
        if (reason := _bind_socket(folder / _SOCKET_NAME)) is not None:
            fact["faults"]["socket"] = reason
        if (reason := _map_executable(folder / "code")) is not None:
            fact["faults"]["exec"] = reason
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return fact


def _bind_socket(path: Path) -> str | None:
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind(str(path))
        except OSError as error:
            length = len(os.fsencode(path))
            return f"no Unix socket can be made there: {error.strerror or error} ({length} bytes with its name)"
    return None


def _map_executable(path: Path) -> str | None:
    try:
        path.write_bytes(b"\0" * mmap.PAGESIZE)
        with path.open("rb") as file:
            mmap.mmap(
                file.fileno(), mmap.PAGESIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC
            ).close()
    except PermissionError:
        return "nothing can be run from it (mounted noexec)"
    except OSError as error:
        # A full disk is judged by what is free.
        return None if error.errno == errno.ENOSPC else f"no file can be mapped there: {error.strerror or error}"
    return None
