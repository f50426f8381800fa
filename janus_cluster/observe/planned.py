"""The step time that `janus-cluster plan` predicts, beside the measured one. Plan is imported only when needed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from janus_cluster.observe.progress import Progress
from janus_cluster.run.current import current_bundle, load_current
from janus_cluster.run.paths import BundleDir, RunDir
from janus_cluster.run.records.bundle import ResolvedRecord, load_resolved
from janus_cluster.run.records.gate import FactsRecord

if TYPE_CHECKING:
    from janus_cluster.plan.hardware import Gpu

# A step slower than planned by more than this is shown with what to look at.
SLOWER = 0.25
# Waiting for data is named as the reason where it is at least this share of the step.
_WAITS = 0.1


def load_plan_step_time(run: RunDir, *, attempt: int | None, nodes: Sequence[str]) -> float | None:
    """Seconds a step that the plan predicts for the resolved job.

    Returns: None for a run without GPUs, for a GPU that plan does not know, and for a job that this version cannot
    read: another GPU's figure would be wrong.
    """
    gpu_type = _gpu_type(load_current(run))
    if gpu_type is None:
        return None
    gpu = _gpu_of(run, gpu_type, attempt=attempt, nodes=nodes)
    return None if gpu is None else _predict(current_bundle(run), gpu)


def _gpu_type(resolved: ResolvedRecord) -> str | None:
    """hardware.gpu_type of a training job that computes on GPUs; None for any other."""
    if resolved.value("kind") != "train" or resolved.value("hardware.device") != "cuda":
        return None
    return str(resolved.value("hardware.gpu_type"))


def _gpu_of(run: RunDir, gpu_type: str, *, attempt: int | None, nodes: Sequence[str]) -> Gpu | None:
    """The GPU that the gate found; else the one that the job asked for."""
    from janus_cluster.errors import UsageError
    from janus_cluster.plan.hardware import find_gpu, known_gpus

    seen = {name for node in nodes for name in _gpu_names(run, attempt, node)}
    if not seen:
        try:
            return find_gpu(gpu_type)
        except UsageError:
            return None  # its file is no longer there
    # Whole words: a GH200 is no H200.
    fitting = [gpu for key, gpu in known_gpus().items() if all(key in re.split(r"[\s-]", name) for name in seen)]
    return fitting[0] if len(fitting) == 1 else None


def _gpu_names(run: RunDir, attempt: int | None, node: str) -> list[str]:
    if attempt is None:
        return []
    facts = FactsRecord.load(run.facts_json(attempt, node))
    return [name.lower() for name in facts.gpu_names] if facts else []


def _predict(bundle: BundleDir, gpu: Gpu) -> float | None:
    from janus_cluster.errors import UsageError
    from janus_cluster.modelspec.sizes import load_sizes
    from janus_cluster.plan.choose import plan_option

    try:
        resolved = load_resolved(bundle)
        option = plan_option(
            resolved.job, sizes=load_sizes(resolved.job.model), ranks_per_node=resolved.processes_per_node, gpu=gpu
        )
    except (UsageError, OSError, ValueError):
        # Another version's keys, or a model that is no longer on this disk.
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
