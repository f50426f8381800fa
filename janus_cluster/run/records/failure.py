"""What failed: FailureRecord, classified once on the node and kept in attempt.json.

It is classified from RankFailure, written by the rank itself, and from ScriptFailure, written by job.sbatch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from janus_cluster.errors import FailureKind
from janus_cluster.run.records.base import Record

# Characters of an error's line in a log or on a screen: an exception may have a million.
LONGEST_LINE = 300
TITLES: Mapping[FailureKind, str] = {
    "preflight": "the gate refused the nodes",
    "preflight_undetermined": "the gate could not be judged",
    "launch": "the step could not be started",
    "environment": "the job's environment is broken",
    "walltime": "the walltime was used up",
    "preempted": "preempted by another job",
    "node_lost": "a node was lost",
    "cancelled": "ended by a user or a signal from outside",
    "host_out_of_memory": "the node's memory ran out",
    "gpu_out_of_memory": "GPU memory ran out",
    "xid": "a GPU failed (Xid)",
    "disk_full": "the disk is full",
    "read_only": "the file system is read-only",
    "file_system": "a file system failed",
    "bad_data": "a sample that cannot be used",
    "loader": "a data loader's worker could not go on",
    "bad_weights": "the weights or the data give no finite loss",
    "diverged": "the loss is no number any more",
    "nccl_timeout": "a collective timed out",
    "hang": "a rank hung",
    "network": "the network between the ranks failed",
    "signal": "a rank was killed by a signal",
    "exception": "a rank raised an error",
    "unknown": "unknown",
}


@dataclass(frozen=True, kw_only=True)
class FailureRecord(Record):
    """What failed first, and on which rank and node. `hint`: the remedy that the error itself names.

    path: the sample that cannot be used. frames: the innermost ones of the traceback. error_type: the class of the
    rank's exception. exit_code: the attempt's.
    """

    SCHEMA_VERSION: ClassVar[int | None] = None

    kind: FailureKind
    rank: int | None = None
    node: str | None = None
    message: str | None = None
    frames: tuple[str, ...] = ()
    path: str | None = None
    hint: str | None = None
    exit_code: int | None = None
    error_type: str | None = None

    @property
    def title(self) -> str:
        return TITLES[self.kind]

    def describe(self) -> str:
        """One line: the class, who was first, and the beginning of the message."""
        rank = f"rank {self.rank}" if self.rank is not None else None
        place = " on ".join(part for part in (rank, self.node) if part)
        first = (self.message or "").split("\n", maxsplit=1)[0][:LONGEST_LINE]
        return ": ".join(part for part in (self.title, place, first) if part)

    @property
    def blames_node(self) -> bool:
        """Whether the node itself is to be avoided, for any job."""
        return self.kind in ("xid", "node_lost") and self.node is not None


@dataclass(frozen=True, kw_only=True)
class RankFailure(Record):
    """failures/rank<r>.json: the exception that ended a rank, written by that rank. Units: time epoch seconds.

    `kind`: the class, where the code that raised it knows. `is_follow_up`: it only reports that another rank failed.
    """

    rank: int
    node: str
    time: float
    type: str
    message: str
    hint: str | None = None
    kind: FailureKind | None = None
    is_follow_up: bool = False
    traceback: str = ""


@dataclass(frozen=True, kw_only=True)
class ScriptFailure(Record):
    """logs/script_failure.json: why job.sbatch ended before the attempt could begin. It starts by removing the file."""

    job_id: str
    node: str
    message: str
