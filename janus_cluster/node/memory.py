"""training.memory: auto on the nodes: an attempt that ran out of memory in its first step is followed by a smaller one.

Which options there are was decided at the desk and stands in resolved.json; here the next one is taken. resolved.json
is the one truth: ds_config.json follows it, and the nodes wait until they see the same (node/task.py).
"""

from __future__ import annotations

import time

from janus_cluster.config.load import with_values
from janus_cluster.config.resolve import hash_config
from janus_cluster.config.schema import MemoryPlan, ResolvedJob
from janus_cluster.errors import JanusError
from janus_cluster.observe.failure import Failure
from janus_cluster.render.bundle import keep_bundle
from janus_cluster.rundir import RunDir, read_json, write_json_atomically

# A file that another node has just replaced may need this long to be seen through NFS's caches of names.
_VISIBILITY_S = 120.0
_LOOK_S = 0.5


def load_settled(run: RunDir) -> ResolvedJob:
    """The job as resolved.json has it; with training.memory: auto ds_config.json says the same.

    They differ where a node went down between the two of take_option's writes.
    """
    resolved = ResolvedJob.load(run.resolved_json.read_text(encoding="utf-8"))
    if resolved.memory is not None and not _has_ds_config(run, resolved):
        _write_private(run, resolved)
    return resolved


def wait_until_seen(run: RunDir, *, config_hash: str | None, limit_s: float = _VISIBILITY_S) -> ResolvedJob:
    """The job that the attempt means by `config_hash`, as this node sees it; without one, whatever is there.

    Raises: JanusError where this node still sees another one after `limit_s`.
    """
    deadline = time.monotonic() + limit_s
    while True:
        try:
            text = run.resolved_json.read_text(encoding="utf-8")
        except OSError:
            # Replaced on another node a moment ago, NFS may give a stale handle.
            if time.monotonic() > deadline:
                raise
            time.sleep(_LOOK_S)
            continue
        resolved = ResolvedJob.load(text)
        is_whole = resolved.memory is None or _has_ds_config(run, resolved)
        if config_hash is None or (resolved.config_hash == config_hash and is_whole):
            return resolved
        if time.monotonic() > deadline:
            raise JanusError(
                f"{run.resolved_json}: this node sees configuration {resolved.config_hash[:12]}, the attempt means "
                f"{config_hash[:12]}, and waited {limit_s:.0f} s for it",
                hint="does the run folder lie on a disk that all nodes share?",
            )
        time.sleep(_LOOK_S)


def describe_option(memory: MemoryPlan) -> str:
    """One line: which option of how many runs, what it was planned with, and why not the one before it."""
    option, count = memory.option, len(memory.options)
    why = f"; {memory.because}" if memory.because else ""
    which = f"option {memory.taken + 1} of {count}" if count > 1 else "the only option"
    return f"memory: {option.words}, {option.planned_gb:.3g} of {memory.limit_gb:.3g} GB planned ({which}{why})"


def describe_taken(resolved: ResolvedJob) -> str:
    """The option that the job has now, in words."""
    return "" if resolved.memory is None else resolved.memory.option.words


def is_out_of_memory(failure: Failure, resolved: ResolvedJob) -> bool:
    """Whether what was planned did not fit: a GPU's memory, or where training computes on the CPU, a rank's."""
    kinds = {"gpu_out_of_memory"} | ({"host_out_of_memory"} if resolved.job.hardware.device == "cpu" else set())
    return failure.kind in kinds


def has_stepped(run: RunDir, *, attempt: int, world_size: int) -> bool:
    """Whether any rank has completed an optimizer step in that attempt."""
    for rank in range(world_size):
        try:
            if read_json(run.heartbeat_json(attempt, rank)).get("has_stepped"):
                return True
        except (OSError, ValueError):
            # A rank that had not begun.
            continue
    return False


def take_next_option(run: RunDir, resolved: ResolvedJob, *, because: str) -> ResolvedJob:
    """resolved.json and ds_config.json hold the next, smaller option; what they held before lies in history/<n>."""
    memory = resolved.memory
    if memory is None or memory.next_option is None:
        raise ValueError("there is no smaller option")
    taken: MemoryPlan = memory.model_copy(update={"taken": memory.taken + 1, "because": because})
    job = with_values(resolved.job, taken.option.keys)
    after = resolved.model_copy(
        update={
            "job": job,
            "config_hash": hash_config(job),
            "ds_config": taken.option.ds_config,
            "memory": taken,
        }
    )
    keep_bundle(run)
    write_json_atomically(run.resolved_json, after.model_dump(mode="python"))
    run.resolved_json.chmod(0o600)
    _write_private(run, after)
    return after


def _has_ds_config(run: RunDir, resolved: ResolvedJob) -> bool:
    try:
        return bool(read_json(run.ds_config_json) == resolved.ds_config)
    except (OSError, ValueError):
        return False


def _write_private(run: RunDir, resolved: ResolvedJob) -> None:
    write_json_atomically(run.ds_config_json, resolved.ds_config)
    run.ds_config_json.chmod(0o600)
