"""nodes_min: the bundles with which a job runs on fewer nodes than it would like. Nothing is written here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from janus_cluster.errors import UsageError
from janus_cluster.job.load import LoadedJob, with_values
from janus_cluster.job.resolve import processes_per_node, resolve_fallbacks
from janus_cluster.job.resolved import MemoryPlan, ResolvedJob
from janus_cluster.modelspec.zero_cut import find_obstacle

# (job, what training.memory: auto chose for it, number of its bundle) → the job resolved
Resolve = Callable[[LoadedJob, MemoryPlan | None, int], ResolvedJob]


def with_fewer_nodes(resolved: ResolvedJob, loaded: LoadedJob, resolve: Resolve) -> tuple[ResolvedJob, ...]:
    """The job, and the same job on every smaller number of nodes down to nodes_min that keeps the effective batch.

    Each has bundles of its own, and lists those for fewer nodes. Alone where the job wants exactly its nodes.
    Raises: UsageError where nodes_min itself keeps no batch, or where checkpoints are bound to a number of ranks.
    """
    job = resolved.job
    if job.nodes_min is None or job.nodes_min == job.nodes or job.kind != "train" or resolved.cluster == "local":
        return (resolved,)
    where = f"{loaded.origins.get('nodes_min', loaded.source)}: nodes_min: {job.nodes_min}"
    if (obstacle := find_obstacle(resolved.ds_config)) is not None:
        raise UsageError(
            f"{where}: with {obstacle} a checkpoint cannot be read by another number of ranks",
            hint="leave nodes_min or that setting out",
        )
    every = dict(_on_each(resolved, loaded, range(1, job.nodes)))
    if job.nodes_min not in every:
        fitting = ", ".join(map(str, sorted(every))) or "none"
        raise UsageError(
            f"{where}: the effective batch of {resolved.effective_batch_size} is not kept on so many nodes; fewer than "
            f"{job.nodes} that keep it: {fitting}",
            hint=f"--set nodes_min={max(every)}" if every else "leave nodes_min out",
        )
    found, bundles, number = [], {}, resolved.bundle + len(resolve_fallbacks(resolved))
    for nodes in sorted((n for n in every if n >= job.nodes_min), reverse=True):
        found.append(resolve(*every[nodes], number))
        bundles[nodes] = number
        number += len(resolve_fallbacks(found[-1]))
    return tuple(_naming_fewer(each, bundles) for each in (resolved, *found))


def _naming_fewer(resolved: ResolvedJob, bundles: Mapping[int, int]) -> ResolvedJob:
    fewer = {nodes: number for nodes, number in bundles.items() if nodes < resolved.job.nodes}
    return resolved.model_copy(update={"fewer_nodes": fewer})


def _on_each(
    resolved: ResolvedJob, loaded: LoadedJob, numbers: range
) -> Iterator[tuple[int, tuple[LoadedJob, MemoryPlan | None]]]:
    """Number of nodes → the job on so many, with the effective batch of before; where none keeps it, nothing."""
    batch, before = resolved.effective_batch_size, resolved.memory
    for nodes in numbers:
        job = with_values(loaded.config, {"nodes": nodes})
        if before is not None:
            from janus_cluster.plan.auto import plan_memory_keys

            try:
                on_nodes = replace(loaded, config=job)
                yield nodes, plan_memory_keys(on_nodes, batch=batch, below_gb=before.out_of_memory_gb)
            except UsageError:
                continue
        else:
            per_step = job.training.per_device_batch_size * nodes * processes_per_node(job)
            if batch % per_step == 0:
                steps = {"training.gradient_accumulation_steps": batch // per_step}
                yield nodes, (replace(loaded, config=with_values(job, steps)), None)
