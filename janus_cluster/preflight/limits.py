"""Limits of the node on a process: locked memory, open files, /dev/shm, free memory."""

from __future__ import annotations

import os
import re
import resource
from typing import Any

from janus_cluster.preflight.model import Check
from janus_cluster.preflight.sysfs import NodeRoot, read_cgroup_files, read_text
from janus_cluster.run.records.verdict import CheckResult, State

GIB = 2**30


def read_limits(root: NodeRoot) -> dict[str, Any]:
    """Facts. Units: bytes, files; None for no limit (memlock, nofile) or no value (the others)."""
    shm: dict[str, Any] = {"path": str(root.shm), "total_bytes": None, "free_bytes": None}
    try:
        stat = os.statvfs(root.shm)
        shm |= {"total_bytes": stat.f_blocks * stat.f_frsize, "free_bytes": stat.f_bavail * stat.f_frsize}
    except OSError as e:
        shm["error"] = e.strerror
    return {
        "memlock_bytes": _soft(resource.RLIMIT_MEMLOCK),
        "nofile": _soft(resource.RLIMIT_NOFILE),
        "shm": shm,
        "memory_available_bytes": parse_available(read_text(root.proc / "meminfo") or ""),
        "memory_limit_bytes": read_memory_limit(root),
    }


def _soft(which: int) -> int | None:
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def parse_available(meminfo: str) -> int | None:
    """MemAvailable in bytes; None where the kernel does not report it."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo, re.MULTILINE | re.ASCII)
    return int(match[1]) * 1024 if match else None


def read_memory_limit(root: NodeRoot) -> int | None:
    """Bytes that the job's cgroup may use, the least of it and those above it; None without a limit.

    Slurm gives a job what it asked for or the partition's default, --exclusive or not; past it the kernel kills.
    """
    found = read_cgroup_files(root, "memory", v1="memory.limit_in_bytes", v2="memory.max")
    # Version 1 writes no limit as the largest number of pages, about 8 EiB.
    limits = [int(text) for text in found if text.isdigit() and int(text) < 2**60]
    return min(limits, default=None)


def judge_limits(fact: dict[str, Any], profile: dict[str, Any], *, node: str) -> list[CheckResult]:
    """Each limit against `warn_below` and `fail_below` of the profile; no limit passes every threshold."""
    shm = fact["shm"]
    available, limit = fact["memory_available_bytes"], fact.get("memory_limit_bytes")
    is_limited = limit is not None and (available is None or limit < available)
    memory_fix = (
        "the limit is the job's own (cgroup): --set slurm.mem=0 asks for all of the node's memory"
        if is_limited
        else f"on {node}: ps aux --sort=-rss | head; another job or a leftover process holds the memory"
    )
    shm_fix = f"on {node}: mount -o remount,size=64G {shm['path']}; in a container: --shm-size=64g"
    return [
        _judge(
            "limits.memlock", fact["memlock_bytes"], profile["memlock_gib"], node, unlimited_is_none=True,
            blames_node=False,  # Slurm may hand down the limit of the shell that submitted
            fix=f"on {node}: ulimit -l unlimited (limits.conf; slurm.conf: PropagateResourceLimitsExcept=MEMLOCK)",
        ),
        _judge(
            "limits.nofile", fact["nofile"], profile["nofile"], node, unlimited_is_none=True, divisor=1, unit="files",
            fix=f"on {node}: ulimit -n 1048576 (limits.conf)",
        ),
        _judge("limits.shm", shm["total_bytes"], profile["shm_gib"], node, fix=shm_fix),
        _judge(
            "limits.shm_free", shm["free_bytes"], profile["shm_free_gib"], node,
            fix=f"on {node}: ls -l {shm['path']}; remove what dead jobs left",
        ),
        _judge(
            "limits.memory", limit if is_limited else available, profile["memory_gib"], node, fix=memory_fix,
        ),
    ]  # fmt: skip


def _judge(
    check_id: str,
    value: int | None,
    threshold: dict[str, Any],
    node: str,
    *,
    fix: str,
    unlimited_is_none: bool = False,
    blames_node: bool = True,
    divisor: int = GIB,
    unit: str = "GiB",
) -> CheckResult:
    warn, fail = threshold.get("warn_below"), threshold.get("fail_below")
    floors = [f"warn below {warn:g}"] if warn else []
    floors += [f"fail below {fail:g}"] if fail else []
    expected = f"{', '.join(floors)} {unit}" if floors else "no floor in this profile"
    check = Check(id=check_id, node=node, expected=expected, source=threshold["source"], unit=unit)
    if value is None:
        if unlimited_is_none:
            return check.judged("PASS", "unlimited")
        return check.judged("ERROR" if floors else "SKIP", "not reported", fix=fix)
    amount = value / divisor
    state: State = "FAIL" if fail and amount < fail else "WARN" if warn and amount < warn else "PASS"
    measured = render_bytes(value) if divisor > 1 else f"{value} {unit}"
    return check.judged(state, measured, fix=fix, blames_node=blames_node)


def render_bytes(value: int) -> str:
    """`64 KiB`, `8 MiB`, `31.5 GiB`: in the unit in which the number is readable."""
    for unit, size in (("GiB", GIB), ("MiB", 2**20)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1024:.3g} KiB"
