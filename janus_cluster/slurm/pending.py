"""Why a job waits, by Slurm's reason: it will start, a limit holds it back, or it cannot start. Pure functions.

Source: squeue(1), "JOB REASON CODES", 22.05 to 25.05.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Outlook = Literal["waits", "limit", "never"]

# First match counts. `{job}`: the job id.
_RULES: tuple[tuple[str, Outlook, str, str], ...] = (
    (
        "DependencyNeverSatisfied", "never", "the job that it depends on did not end as it must",
        "scancel {job}; submit it again without that dependency",
    ),
    (
        r"JobHeldUser|JobHoldMaxRequeue|job requeued in held state|user hold", "never", "it is held",
        "scontrol release {job}",
    ),
    (
        "JobHeldAdmin", "never", "an administrator holds it",
        "ask the administrators; only they release it (scontrol release {job})",
    ),
    (
        r"JobLaunchFailure|launch failed requeued held", "never", "a node could not start it, so Slurm holds it",
        "scontrol release {job} once the node sees the run folder",
    ),
    (
        r"BadConstraints|PartitionNodeLimit|PartitionTimeLimit|PartitionDown|PartitionInactive|PartitionConfig|NodeNotAvail$|"
        r"AccountNotAllowed|QOSNotAllowed|InvalidAccount|InvalidQOS|"
        r"ReservationDeleted|ReservationInvalid|NodeDown|FrontEndDown|\w*Min(?:GRES|CpuLimit|Memory)\w*|"
        r"\w*MaxWallDurationPerJobLimit|\w*Max(?:Cpu|GRES|Node|Memory|TRES)PerJob\w*",
        "never", "no node, partition or limit of today lets it start as it asks",
        "sinfo -R; scontrol show job {job}; then scancel {job} and other slurm.… keys, or wait for the site",
    ),
    (
        "Nodes required for job are DOWN, DRAINED", "waits", "nodes that it needs are down, drained or reserved",
        "sinfo -R",
    ),
    (
        r"(?:QOS|Assoc|Max|Grp|Job)\w*Limit\w*|(?:QOS|Assoc)(?:Max|Grp)\w*|QOSUsageThreshold|Licenses", "limit",
        "a limit of your user, account or QOS is used up", "squeue --me   # your jobs; it starts when one of them ends",
    ),
)  # fmt: skip


_FOR_USER_ALONE = re.compile(r"DependencyNeverSatisfied|JobHeldUser|user hold|BadConstraints|Invalid(?:Account|QOS)")


@dataclass(frozen=True)
class Pending:
    """`meaning` of a reason, and what to type about it; both are empty for a job that only waits its turn."""

    outlook: Outlook
    meaning: str = ""
    command: str = ""
    # Neither a node that returns nor an administrator changes it.
    is_for_user_alone: bool = False


def read_reason(reason: str | None, *, job_id: str) -> Pending:
    """What Slurm's reason of a waiting job means for its start."""
    for pattern, outlook, meaning, command in _RULES:
        if re.search(pattern, reason or ""):
            alone = _FOR_USER_ALONE.search(reason or "") is not None
            return Pending(outlook, meaning, command.replace("{job}", job_id), alone)
    return Pending("waits")
