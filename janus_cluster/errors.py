"""Every error a user can meet, and the exit code of each.

    JanusError                1   anything that has no better name
    ├── UsageError            2   the job file, an option or a path is wrong; nothing was written
    │   └── SubmitFailed      2   sbatch refused the job; its own words are in the message
    ├── GateFailed           10   preflight refused the nodes; training did not start
    ├── GateUndetermined     11   preflight could not be judged (a node did not report, a verdict is stale)
    ├── TrainingFailed       12   training ran and ended with an error
    ├── StoppedOnPurpose     13   a stop signal ended the attempt
    ├── RehearsalFailed      14   a rehearsal ran, and something that it was to prove does not hold
    ├── SlurmUnavailable     21   there is no Slurm here, or it does not answer
    ├── JobNotFound          22   no run or job of that name
    └── SandboxFailed        23   the sandbox Slurm could not be started or stopped

`janus-cluster preflight` alone uses 0 pass, 1 warn, 2 fail, 3 undetermined.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

# Of every command; `--help` and README show it. 3 is preflight's alone, where 1 and 2 have a meaning of their own.
EXIT_CODES: Mapping[int, str] = {
    0: "done",
    1: "an error without a better name",
    2: "wrong input, or sbatch refused; nothing was written",
    10: "preflight failed: training never started",
    11: "preflight could not be judged",
    12: "training failed",
    13: "stopped on purpose",
    14: "a rehearsal ran, and something that it was to prove does not hold",
    21: "no Slurm here",
    22: "no such job",
    23: "the sandbox could not be started or stopped",
    130: "interrupted at the keyboard; the job is left alone",
    141: "the reader of the output has gone, a pipe into `head`",
}
PREFLIGHT_EXIT_CODES: Mapping[int, str] = {0: "pass", 1: "warn", 2: "fail", 3: "undetermined"}


class JanusError(Exception):
    """What was wrong, where, and what to type next.

    `hint` is the next thing to type or to change; it is printed on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(JanusError):
    """The job file, an option or a path is wrong. Nothing was written."""

    exit_code = 2

    @classmethod
    def of_many(cls, problems: Sequence[str], *, hint: str | None = None) -> UsageError:
        """One error that lists every problem, so that a job file is mended in one go."""
        if len(problems) == 1:
            return cls(problems[0], hint=hint)
        lines = "\n".join(f"  {i}. {p}" for i, p in enumerate(problems, 1))
        return cls(f"{len(problems)} problems:\n{lines}", hint=hint)


class SubmitFailed(UsageError):
    """sbatch refused the job. The run folder is gone again."""


class GateFailed(JanusError):
    exit_code = 10


class GateUndetermined(JanusError):
    exit_code = 11


class TrainingFailed(JanusError):
    exit_code = 12


class StoppedOnPurpose(JanusError):
    exit_code = 13


class RehearsalFailed(JanusError):
    exit_code = 14


class SlurmUnavailable(JanusError):
    exit_code = 21


class JobNotFound(JanusError):
    exit_code = 22


class SandboxFailed(JanusError):
    exit_code = 23


def print_error(error: JanusError) -> int:
    """The error and what to type next are on stderr. Returns: the exit code."""
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"next:  {error.hint}", file=sys.stderr)
    return error.exit_code
