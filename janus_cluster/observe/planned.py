"""What `janus-cluster plan` predicts for a run's step, beside the measured one. Plan is imported only when needed."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from janus_cluster.observe.progress import Progress
from janus_cluster.rundir import RunDir, read_json

if TYPE_CHECKING:
    from janus_cluster.plan.hardware import Gpu

# Slower than planned by more than this is told with what to look at.
SLOWER = 0.25
# Waiting for data is named as the reason where it is at least this share of the step.
_WAITS = 0.1


def load_plan_step_time(run: RunDir, *, attempt: int | None, nodes: Sequence[str]) -> float | None:
    """Seconds a step that the plan predicts for the run as it is resolved.

    Returns: None for a run without GPUs, for a GPU that plan does not know, and for a job that this version cannot
    read: no other GPU's figure is shown in its place.
    """
    try:
        text = run.resolved_json.read_text(encoding="utf-8")
        gpu_type = _gpu_type(text)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if gpu_type is None:
        return None
    from janus_cluster.plan.hardware import GPUS

    gpu = _gpu_of(run, gpu_type, GPUS, attempt=attempt, nodes=nodes)
    return None if gpu is None else _predict(text, gpu)


def _gpu_type(text: str) -> str | None:
    """hardware.gpu_type of a training job that computes on GPUs. Raises: ValueError, KeyError, TypeError."""
    job = json.loads(text)["job"]
    if job["kind"] != "train" or job["hardware"]["device"] != "cuda":
        return None
    return str(job["hardware"]["gpu_type"]).lower()


def _gpu_of(
    run: RunDir, gpu_type: str, known: dict[str, Gpu], *, attempt: int | None, nodes: Sequence[str]
) -> Gpu | None:
    """The GPU that the gate saw; where it saw none, the one that the job asked for."""
    seen = {name for node in nodes for name in _gpu_names(run, attempt, node)}
    if not seen:
        return known.get(gpu_type)
    # Whole words: a GH200 is no H200.
    fitting = [gpu for key, gpu in known.items() if all(key in re.split(r"[\s-]", name) for name in seen)]
    return fitting[0] if len(fitting) == 1 else None


def _gpu_names(run: RunDir, attempt: int | None, node: str) -> list[str]:
    if attempt is None:
        return []
    try:
        facts: Any = read_json(run.facts_json(attempt, node))
        return [str(row["name"]).lower() for row in facts["gpu"]["identity"]["rows"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _predict(text: str, gpu: Gpu) -> float | None:
    from janus_cluster.config.schema import ResolvedJob
    from janus_cluster.errors import UsageError
    from janus_cluster.plan.choose import plan_option
    from janus_cluster.plan.sizes import load_sizes

    try:
        resolved = ResolvedJob.load(text)
        option = plan_option(
            resolved.job, sizes=load_sizes(resolved.job.model), ranks_per_node=resolved.processes_per_node, gpu=gpu
        )
    except (UsageError, ValueError):
        # Another version's keys, or a model that is gone from this disk.
        return None
    return option.time.total


def describe_plan(progress: Progress, planned_s: float | None, *, job_file: str) -> list[str]:
    """The measured step beside the planned one; where it is much slower, what to look at."""
    measured_s = progress.median_step_time_s
    if measured_s is None or not planned_s:
        return []
    more = measured_s / planned_s - 1
    lines = [f"s/step {measured_s:.2f} (median of the last logged), plan {planned_s:.2f} ({more:+.0%})"]
    if more > SLOWER:
        lines.append(
            f"  slower than planned: {_describe_wait(progress, measured_s)}; then visual tokens a rank (above), "
            f"janus-cluster plan {job_file}, docs/troubleshooting.md#slow-step"
        )
    return lines


def _describe_wait(progress: Progress, measured_s: float) -> str:
    waits = progress.ranks.get("data_wait_s", ())
    if not waits:
        return "how long ranks wait for data is not logged"
    share = max(waits) / measured_s
    if share >= _WAITS:
        return f"waiting for data is {share:.0%} of the step (data.num_workers)"
    return f"waiting for data is only {share:.0%} of the step"
