"""What sbatch's answer proves: the job is queued, it was refused, or neither. Pure functions.

An answer that was lost on the way (a time-out, a connection that was reset) proves nothing: the controller may have
queued the job. Source: sbatch(1) and slurm_errno.c of 22.05 to 25.05.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from janus_cluster.slurm.trouble import find_trouble

RefusalKind = Literal["wrong", "limit", "away"]

_QUEUED = re.compile(r"^Submitted batch job (\d+)(?: on cluster (\S+))?\s*$", re.MULTILINE)
# `sbatch --parsable`, as a site's wrapper may call it.
_BARE = re.compile(r"^(\d+)(?:;(\S+))?$")
# The request may have arrived.
_LOST = re.compile(
    r"socket timed out|zero bytes were transmitted|transport endpoint is not connected|connection reset|broken pipe|"
    r"unexpected message received|message (?:receive|send) failure|unable to contact slurm controller \(send|"
    r"communications? (?:connection )?(?:failure|shutdown|receive|send)",
    re.IGNORECASE,
)
_LIMIT = re.compile(
    r"\b(?:QOS|Assoc|Max\w*Per|Grp)\w*(?:Limit|Max|Min|PerUser|PerAccount)\w*|violates accounting/QOS policy|"
    r"job submit limit|too many jobs|job count limit",
    re.IGNORECASE,
)
# What one job may ask for: to wait changes nothing.
_TOO_LARGE = re.compile(r"\b(?:QOS|Assoc)?Max\w*PerJob\w*")
# sbatch's own message, an option that it refuses before it sends anything among them.
_REFUSED = re.compile(r"^sbatch: (?:error|fatal): |^sbatch: .*option", re.MULTILINE)


@dataclass(frozen=True)
class SbatchAnswer:
    """How sbatch ended: its exit code (negative: a signal; 127: it could not be started) and both outputs."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def message(self) -> str:
        return self.stderr.strip() or self.stdout.strip() or f"exit code {self.returncode}, no output"


@dataclass(frozen=True)
class Queued:
    """A job that is in the queue, and its cluster where the answer names one."""

    job_id: str
    cluster: str | None = None


@dataclass(frozen=True)
class Refusal:
    """sbatch or the controller refused, so nothing is queued.

    wrong: an option or a value; limit: a limit of the user, account or QOS; away: no controller took the request.
    """

    kind: RefusalKind


def may_arrive_later(answer: SbatchAnswer) -> bool:
    """Whether a busy controller may take the request after the queue was searched for its job."""
    return answer.returncode < 0 or _LOST.search(answer.stderr) is not None


def read_answer(answer: SbatchAnswer) -> Queued | Refusal | None:
    """What the answer proves; None: nothing, the job may be queued or not."""
    if found := _QUEUED.search(answer.stdout):
        # A wrapper's own failure after it does not take the job back.
        return Queued(found[1], found[2])
    last = answer.stdout.strip().rpartition("\n")[2].strip()
    if answer.returncode == 0:
        return Queued(bare[1], bare[2]) if (bare := _BARE.match(last)) else None
    if answer.returncode == 127:
        return Refusal("away")
    text = answer.stderr
    if answer.returncode < 0 or _LOST.search(text):
        return None
    # The request never reached a controller that would have taken it.
    if find_trouble(text) is not None:
        return Refusal("away")
    if _TOO_LARGE.search(text):
        return Refusal("wrong")
    if _REFUSED.search(text) or _LIMIT.search(text):
        return Refusal("limit" if _LIMIT.search(text) else "wrong")
    return None
