"""How often the kernel has ended a process of this job for want of memory, by the job's memory cgroup."""

from __future__ import annotations

import re
from pathlib import Path

from janus_cluster.preflight.sysfs import NodeRoot, read_text
from janus_cluster.run.text import counted

_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


def read_oom_kills(root: NodeRoot) -> int:
    """The count of this process's memory cgroup and those below it; 0 where the kernel reports none."""
    mounted = root.sys / "fs" / "cgroup"
    for line in (read_text(root.proc / "self" / "cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        # An empty list of controllers is cgroup v2.
        base, name = (mounted / "memory", "memory.oom_control") if controllers else (mounted, "memory.events")
        if found := _COUNT.search(read_text(base / Path(path.lstrip("/")) / name) or ""):
            return int(found[1])
    return 0


def describe_oom_kills(count: int) -> str:
    """The line of the node's log by which the diagnosis recognises them."""
    return f"memory: the kernel ended {counted(count, 'process')} of this job (oom_kill of its memory cgroup)"
