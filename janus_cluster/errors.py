"""Every error a user can meet, and the exit code of each.

    JanusError                1   anything that has no better name
    ├── UsageError            2   the job file, an option or a path is wrong; nothing was written
    │   └── SubmitFailed      2   sbatch refused the job; the message quotes sbatch
    │       └── LimitReached 25   for a limit of the user, account or QOS: the same job may be taken later
    ├── GateFailed           10   preflight refused the nodes; training did not start
    ├── GateUndetermined     11   preflight could not be judged (a node did not report, a verdict is stale)
    ├── StepNotStarted       11   srun ended before a task began on any node
    ├── TrainingFailed       12   training ran and ended with an error
    ├── StoppedOnPurpose     13   a stop signal ended the attempt
    ├── RehearsalFailed      14   a rehearsal ran, and something that it was to prove does not hold
    ├── SlurmUnavailable     21   there is no Slurm here, or it does not answer
    │   └── MaybeQueued      21   sbatch's answer was lost: the job may be queued; the run folder stays
    ├── JobNotFound          22   no run or job of that name
    ├── SandboxFailed        23   the sandbox Slurm could not be started or stopped
    └── JobCannotStart       24   the job is queued and cannot start (held, a dependency that failed, …)

`janus-cluster preflight` alone uses 0 pass, 1 warn, 2 fail, 3 undetermined.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Mapping, Sequence
from typing import Literal

# Of every command; `--help` and README show it. 3 is preflight's alone, where 1 and 2 have a meaning of their own.
EXIT_CODES: Mapping[int, str] = {
    0: "done",
    1: "an error without a better name",
    2: "wrong input, or sbatch refused; nothing was written",
    10: "preflight failed: training never started",
    11: "preflight could not be judged, or srun could not start the step",
    12: "training failed",
    13: "stopped on purpose",
    14: "a rehearsal ran, and something that it was to prove does not hold",
    21: "no Slurm here, or it does not answer",
    22: "no such job",
    23: "the sandbox could not be started or stopped",
    24: "the job is queued and cannot start; it is no longer followed",
    25: "a limit of your user, account or QOS refused the job for now; nothing was written",
    130: "interrupted at the keyboard; the job is left alone",
    141: "the reader of the output has gone, a pipe into `head`",
}
PREFLIGHT_EXIT_CODES: Mapping[int, str] = {0: "pass", 1: "warn", 2: "fail", 3: "undetermined"}

# Of a file system that fails for all of its files, and may be back soon.
FILE_SYSTEM_FAULTS = frozenset({
    errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN, errno.ETIMEDOUT,
})  # fmt: skip

# Why an attempt ended (run/records/failure.py has a title for each).
FailureKind = Literal[
    "preflight", "preflight_undetermined", "launch", "environment", "walltime", "preempted", "node_lost", "cancelled",
    "host_out_of_memory", "gpu_out_of_memory", "xid", "disk_full", "read_only", "file_system",
    "bad_data", "loader", "bad_weights", "diverged",
    "nccl_timeout", "hang",
    "network", "signal", "exception", "unknown",
]  # fmt: skip


class JanusError(Exception):
    """What was wrong, where, and what to type next.

    `hint` is the next thing to type or to change; it is printed on a line of its own. `kind`: the class of failure that
    an attempt has which ends with this error, where that is known.
    """

    exit_code = 1
    kind: FailureKind | None = None

    def __init__(self, message: str, *, hint: str | None = None, kind: FailureKind | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.kind = kind or self.kind


class UsageError(JanusError):
    """The job file, an option or a path is wrong. Nothing was written."""

    exit_code = 2

    @classmethod
    def of_many(cls, problems: Sequence[str], *, hint: str | None = None) -> UsageError:
        """One error that lists every problem, so that a job file can be corrected in one pass."""
        if len(problems) == 1:
            return cls(problems[0], hint=hint)
        lines = "\n".join(f"  {i}. {p}" for i, p in enumerate(problems, 1))
        return cls(f"{len(problems)} problems:\n{lines}", hint=hint)


class SubmitFailed(UsageError):
    """sbatch refused the job. The run folder is removed again."""


class LimitReached(SubmitFailed):
    """Nothing is wrong with the job: a limit of the user, account or QOS is used up."""

    exit_code = 25


class GateFailed(JanusError):
    exit_code = 10
    kind = "preflight"


class GateUndetermined(JanusError):
    exit_code = 11
    kind = "preflight_undetermined"


class StepNotStarted(JanusError):
    """srun ended before a task began on any node: the fault of no node, and no verdict on one."""

    exit_code = 11
    kind = "launch"


class TrainingFailed(JanusError):
    """`is_follow_up`: another rank has failed; this one only reports that it cannot go on without it."""

    exit_code = 12

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        kind: FailureKind | None = None,
        is_follow_up: bool = False,
    ) -> None:
        super().__init__(message, hint=hint, kind=kind)
        self.is_follow_up = is_follow_up


class StoppedOnPurpose(JanusError):
    exit_code = 13


class RehearsalFailed(JanusError):
    exit_code = 14


class SlurmUnavailable(JanusError):
    exit_code = 21


class MaybeQueued(SlurmUnavailable):
    """sbatch's answer was lost and the queue could not be searched. Nothing is removed."""


class JobNotFound(JanusError):
    exit_code = 22


class SandboxFailed(JanusError):
    exit_code = 23


class JobCannotStart(JanusError):
    """The job is queued; it is held, or its dependency, partition or limits keep it from starting."""

    exit_code = 24


def print_error(error: JanusError) -> int:
    """The error and what to type next are on stderr. Returns: the exit code."""
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"next:  {error.hint}", file=sys.stderr)
    return error.exit_code
