"""Processes that a signal ended: for want of memory, by a full /dev/shm, or torchrun itself. Pure."""

from __future__ import annotations

import re

from janus_cluster.diagnosis.evidence import Evidence
from janus_cluster.run.records.failure import FailureRecord

# Lines of node/oom.py and of the kernel.
_OOM_KILLS = re.compile(r"oom_kill of its memory cgroup|Memory cgroup out of memory")
_KILLED_TORCHRUN = re.compile(r"torchrun of this node was ended by (SIG(?!INT\b|TERM\b)\w+)")
_TASK_ENDED = re.compile(
    r"^srun: error: (?P<node>[\w.-]+): task \d+: (?P<how>Exited|Killed|Bus error|Segmentation fault|Aborted).*$",
    re.MULTILINE,
)
_SIGNAL_OF = {"Killed": "SIGKILL", "Bus error": "SIGBUS"}


def oom_line(log: str) -> str | None:
    """The line in which the node's task reports that the kernel ended processes for want of memory."""
    return next((line.strip() for line in reversed(log.split("\n")) if _OOM_KILLS.search(line)), None)


def advise_on_signal(name: str, node: str | None) -> str | None:
    """What to type on the node after a signal whose usual cause is known; None for others."""
    on = f"on {node}: " if node else ""
    advice = {
        "SIGKILL": f"dmesg -T | grep -i 'out of memory'   # {on}an unexplained SIGKILL is mostly the kernel's, "
        "for want of memory; fewer loaders need less: --set data.num_workers=…",
        "SIGBUS": f"df -h /dev/shm; ls -l /dev/shm   # {on}SIGBUS is mostly a full /dev/shm (in a container: "
        "--shm-size=64g), or a file that was cut while it was mapped",
    }
    return advice.get(name)


def find_killed_agent(evidence: Evidence) -> FailureRecord | None:
    """torchrun itself was ended by a signal, as its task or, where that was killed too, srun reports."""
    for place, text in evidence.logs:
        if place == "batch" or ":" in place or not (found := _KILLED_TORCHRUN.search(text)):
            continue
        name = found[1]
        if (line := oom_line(text)) is not None:
            return FailureRecord(kind="host_out_of_memory", node=place, message=f"{name} ended torchrun; {line}")
        return FailureRecord(
            kind="signal", node=place, message=f"{name} ended torchrun", hint=advise_on_signal(name, place)
        )
    # Of the later tasks srun reports that it ended them itself.
    first = _TASK_ENDED.search(dict(evidence.logs).get("batch", ""))
    if first is None or first["how"].startswith("Exited"):
        return None
    name = _SIGNAL_OF.get(first["how"].split(" (")[0], "")
    return FailureRecord(
        kind="signal", node=first["node"], message=first[0].strip(), hint=advise_on_signal(name, first["node"])
    )
