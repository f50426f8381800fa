"""training.memory: auto on the nodes: after an attempt that ran out of memory in its first step, a smaller option.

The options were decided at submission; each is a bundle of its own, which names the next one.
"""

from __future__ import annotations

import time

from janus_cluster.errors import JanusError
from janus_cluster.job.resolved import MemoryPlan, ResolvedJob
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.attempt import HeartbeatRecord
from janus_cluster.run.records.bundle import load_resolved
from janus_cluster.run.records.failure import FailureRecord

# A folder that another node has just made may need this long to be seen through NFS's caches of names.
_VISIBILITY_S = 120.0
_LOOK_S = 0.5


def load_when_visible(run: RunDir, number: int, *, limit_s: float = _VISIBILITY_S) -> ResolvedJob:
    """The job of that bundle, once this node sees it. Raises: JanusError where it does not after `limit_s`."""
    bundle = run.bundle(number)
    deadline = time.monotonic() + limit_s
    while not bundle.resolved_json.exists():
        if time.monotonic() > deadline:
            raise JanusError(
                f"{bundle.resolved_json}: this node does not see it, and waited {limit_s:.0f} s for it",
                hint="is the run folder on a disk that all nodes share?",
            )
        time.sleep(_LOOK_S)
    return load_resolved(bundle)


def describe_option(memory: MemoryPlan, *, because: str | None) -> str:
    """One line: which option of how many runs, what it was planned with, and why the one before it was given up."""
    option, count = memory.option, len(memory.options)
    why = f"; {because}" if because else ""
    which = f"option {memory.taken + 1} of {count}" if count > 1 else "the only option"
    return f"memory: {option.words}, {option.planned_gb:.3g} of {memory.limit_gb:.3g} GB planned ({which}{why})"


def is_out_of_memory(failure: FailureRecord, resolved: ResolvedJob) -> bool:
    """Whether memory ran out: a GPU's, or where training computes on the CPU, a rank's."""
    kinds = {"gpu_out_of_memory"} | ({"host_out_of_memory"} if resolved.job.hardware.device == "cpu" else set())
    return failure.kind in kinds


def has_stepped(run: RunDir, *, attempt: int, world_size: int) -> bool:
    """Whether any rank has completed an optimizer step in that attempt."""
    for rank in range(world_size):
        record = HeartbeatRecord.load(run.heartbeat_json(attempt, rank))
        # No heartbeat: the rank had not begun.
        if record is not None and record.has_stepped:
            return True
    return False
