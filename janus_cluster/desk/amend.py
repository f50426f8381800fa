"""Which keys of a run may change when it is resumed: where and how it computes, never what it learns.

The run's job with a few keys changed is checked and resolved once more. The effective batch is kept: the number of
accumulated micro-batches follows the number of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from janus_cluster.desk.fewer_nodes import with_fewer_nodes
from janus_cluster.errors import UsageError
from janus_cluster.job.load import LoadedJob, flatten, known_keys, load_job, value_of, with_values
from janus_cluster.job.resolve import processes_per_node, resolve_job, with_absolute_paths
from janus_cluster.job.resolved import MemoryPlan, ResolvedJob
from janus_cluster.job.schema import JobConfig
from janus_cluster.modelspec.zero_cut import Cut, find_obstacle
from janus_cluster.run.bundle import next_number, render_job_yaml
from janus_cluster.run.next_command import submit_command
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.bundle import ResolvedRecord
from janus_cluster.run.text import load_secrets

# A dot at the end: everything below. Each of these decides where, how fast or how long, but not what is trained.
_MAY_CHANGE = (
    "nodes", "nodes_min", "slurm.", "hardware.gpus_per_node", "hardware.gpu_type", "hardware.processes_per_node",
    "environment.", "preflight.", "deepspeed.", "checkpoint.", "restart.", "data.num_workers", "data.index_dir",
    "data.image_roots.", "training.per_device_batch_size", "training.gradient_accumulation_steps",
    "training.gradient_checkpointing",
    "training.gradient_checkpointing_every", "training.memory", "hardware.gpu_memory_gb",
    "training.compile", "training.evaluate_every_steps", "training.logging_steps",
    "training.ddp_timeout_s", "training.hang_timeout_s",
)  # fmt: skip
# A run may become longer: the steps done so far are a part of the longer run.
_MAY_GROW = ("training.max_steps", "training.num_epochs")
_EFFECTIVE_BATCH = "training.effective_batch_size"
_ACCUMULATION = "training.gradient_accumulation_steps"
# What training.memory: auto chooses (plan/choose.py, DECIDED).
_CHOSEN = (
    "deepspeed.profile", "training.per_device_batch_size", _ACCUMULATION, "training.gradient_checkpointing",
    "training.gradient_checkpointing_every",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Amended:
    """The resumed run. `changes` are lines for the user; `is_longer`: there is work even after the last step."""

    resolved: ResolvedJob
    fewer_nodes: tuple[ResolvedJob, ...] = ()
    job_yaml_text: str
    secrets: Mapping[str, str]
    changes: tuple[str, ...]
    is_longer: bool


def amend(
    run: RunDir,
    resolved: ResolvedJob,
    *,
    nodes: int | None,
    sets: Sequence[str],
    environ: Mapping[str, str],
    cwd: Path,
) -> Amended:
    """The job with --nodes and --set applied, resolved again for the run's next bundle. Nothing is written.

    Raises: UsageError naming every key that may not change, or why the checkpoint or the batch would not fit.
    """
    job_yaml = run.bundle(resolved.bundle).job_yaml
    before = load_job(job_yaml, environ={})
    after = load_job(job_yaml, sets=sets, options={"nodes": nodes}, environ=environ)
    changed = _changed_keys(before.config, after.config)
    _require_harmless(changed, before.config, after.config, resolved=resolved, run=run)
    _require_same_version(resolved, run)
    if after.config.training.memory == "auto":
        # The run may have other values than its job file, where training.memory: auto chose them.
        changed += [key for key in _CHOSEN if after.origins.get(key) == "--set" and key not in changed]
    job = _with_values(resolved.job, after.config, changed)
    origins = resolved.origins | {key: f"resume {after.origins.get(key, '--set')}" for key in changed}
    given, memory = after.config, None
    if job.training.memory == "auto" and job.kind == "train":
        job, origins, memory = _choose_anew(LoadedJob(job, origins, str(job_yaml), job_yaml), resolved)
        # Read again, the file must mean the same effective batch.
        given = _with_values(given, job, _CHOSEN)
    else:
        job = _keep_effective_batch(job, resolved, is_given=after.origins.get(_ACCUMULATION) == "--set", run=run)
        if job.training.gradient_accumulation_steps != resolved.job.training.gradient_accumulation_steps:
            given = _with_values(given, job, [_ACCUMULATION])
            origins[_ACCUMULATION] = f"resume: keeps the effective batch of {resolved.effective_batch_size}"
    secrets, shell = _shell_of(run, resolved, job, environ)
    loaded = LoadedJob(job, origins, str(job_yaml), job_yaml)

    def resolve(job: LoadedJob, memory: MemoryPlan | None, bundle: int) -> ResolvedJob:
        return resolve_job(
            job,
            run_dir=run.path,
            cluster=resolved.cluster,
            environ=shell,
            cwd=cwd,
            python=resolved.python,
            memory=memory,
            bundle=bundle,
        )

    amended, *fewer = with_fewer_nodes(resolve(loaded, memory, next_number(run)), loaded, resolve)
    _require_carried(resolved, amended)
    return Amended(
        resolved=amended,
        fewer_nodes=tuple(fewer),
        job_yaml_text=render_job_yaml(with_absolute_paths(given, cwd), source=str(job_yaml), sets=sets),
        secrets={name: secrets[name] for name in amended.secret_names},
        changes=(*_describe_changes(resolved, amended), *_describe_memory(memory)),
        is_longer=any(key in _MAY_GROW for key in changed),
    )


def leaf_keys() -> list[str]:
    """Every dotted key that holds a value; a free mapping (slurm, deepspeed.overrides) is one."""
    keys = known_keys()
    return [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]


def may_change(key: str) -> bool:
    """True for a key that does not affect what is trained."""
    return any(key == allowed or (allowed[-1] == "." and f"{key}.".startswith(allowed)) for allowed in _MAY_CHANGE)


def _changed_keys(before: JobConfig, after: JobConfig) -> list[str]:
    return [key for key in leaf_keys() if value_of(before, key) != value_of(after, key)]


def _with_values(job: JobConfig, source: JobConfig, keys: Sequence[str]) -> JobConfig:
    """`job` with the values that `source` has under `keys`; keys without a value stay unset."""
    return with_values(job, {key: value_of(source, key) for key in keys})


def _choose_anew(loaded: LoadedJob, resolved: ResolvedJob) -> tuple[JobConfig, dict[str, str], MemoryPlan | None]:
    """(job, origins, plan) with the keys that training.memory: auto chooses now.

    Options that have run out of memory in this run, and those planned with as much, are not chosen again.
    """
    from janus_cluster.plan.auto import plan_memory_keys

    before = resolved.memory
    failed = [] if before is None else [o.planned_gb for o in before.options[: before.taken]]
    if before is not None and before.out_of_memory_gb is not None:
        failed.append(before.out_of_memory_gb)
    chosen, memory = plan_memory_keys(
        loaded, batch=resolved.effective_batch_size, below_gb=min(failed) if failed else None
    )
    return chosen.config, chosen.origins, memory


def _describe_memory(memory: MemoryPlan | None) -> tuple[str, ...]:
    if memory is None:
        return ()
    from janus_cluster.plan.auto import describe_memory

    return (f"memory: {describe_memory(memory)[0]}",)


def _require_harmless(
    changed: Sequence[str], before: JobConfig, after: JobConfig, *, resolved: ResolvedJob, run: RunDir
) -> None:
    """Raises: UsageError listing every key that would change what is learnt."""
    problems = []
    for key in changed:
        old, new = value_of(before, key), value_of(after, key)
        if may_change(key) or (key == _EFFECTIVE_BATCH and new in (None, resolved.effective_batch_size)):
            continue
        if key in _MAY_GROW:
            if old is None or new is None or new < old:
                problems.append(f"{key}: {_show(old)} → {_show(new)}: a resumed run may only become longer")
        elif key == _EFFECTIVE_BATCH:
            problems.append(f"{key}: {_show(new)}: the run's is {resolved.effective_batch_size}, and it is kept")
        else:
            problems.append(f"{key}: {_show(old)} → {_show(new)}: not what the run has learnt with so far")
    if problems:
        raise UsageError.of_many(
            problems,
            hint=f"only where and how fast it computes may change; for the rest submit a new run: janus-cluster submit "
            f"{run.links.job_yaml} --set …",
        )


def _require_same_version(resolved: ResolvedJob, run: RunDir) -> None:
    """Raises: UsageError where the run's own copy of the code does not know a key that this version writes."""
    if resolved.job.environment.code != "snapshot" or not run.code.is_dir():
        return
    record = ResolvedRecord.require(run.bundle(resolved.bundle).resolved_json)
    written = {key for key, _ in flatten(record.job)}
    unknown = [k for k in leaf_keys() if k not in written and not any(w.startswith(f"{k}.") for w in written)]
    if unknown:
        raise UsageError(
            f"{run.name} keeps the code that it was submitted with, which does not know {', '.join(unknown[:3])}",
            hint="resume it without options, or with the janus-cluster that submitted it: "
            f"{run.bundle(resolved.bundle).manifest_json}",
        )


def _keep_effective_batch(job: JobConfig, resolved: ResolvedJob, *, is_given: bool, run: RunDir) -> JobConfig:
    """The job with as many accumulated micro-batches as keep the effective batch. Raises: UsageError."""
    if job.kind != "train":
        return job
    effective, rows = resolved.effective_batch_size, job.training.per_device_batch_size
    world_size = job.nodes * processes_per_node(job)
    if effective % (rows * world_size):
        fitting = [n for n in range(1, effective + 1) if effective % (n * world_size) == 0]
        raise UsageError(
            f"training.per_device_batch_size: {rows}: {rows} × {world_size} ranks do not divide the run's effective "
            f"batch of {effective}, which is kept",
            hint=f"--set training.per_device_batch_size=N with N one of {', '.join(map(str, fitting))}"
            if fitting
            else f"no per_device_batch_size does on {world_size} ranks: another number of ranks, or a new run: "
            f"{submit_command(run)}",
        )
    needed, given = effective // (rows * world_size), job.training.gradient_accumulation_steps
    if is_given and given != needed:
        raise UsageError(
            f"{_ACCUMULATION}: {given}: {rows} per rank × {given} × {world_size} ranks is {rows * given * world_size}, "
            f"but the run's effective batch of {effective} is kept",
            hint=f"leave the key out: {needed} is taken then",
        )
    training = job.training.model_copy(update={"gradient_accumulation_steps": needed})
    return job.model_copy(update={"training": training})


def _shell_of(
    run: RunDir, resolved: ResolvedJob, job: JobConfig, environ: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """(secrets, all) variables to forward: those of the submission; only names that are new come from this shell."""
    secrets = load_secrets(run)
    lost = [name for name in resolved.secret_names if name not in secrets]
    if lost:
        raise UsageError(
            f"{run.bundle(resolved.bundle).secrets_env} cannot be read, or does not hold {', '.join(lost)}",
            hint="is it yours?",
        )
    known = {v.name: v.value for v in resolved.env if v.origin == "environment.forward"} | secrets
    shell = {name: environ[name] for name in job.environment.forward if name in environ} | known
    return shell, shell


def _require_carried(before: ResolvedJob, after: ResolvedJob) -> None:
    """Raises: UsageError where another number of ranks, stage or cut cannot resume from the run's checkpoints."""
    wrote = Cut.of(before.ds_config, world_size=before.world_size)
    reads = Cut.of(after.ds_config, world_size=after.world_size)
    if after.job.kind != "train" or wrote == reads:
        return
    for config in (before.ds_config, after.ds_config):
        if (obstacle := find_obstacle(config)) is not None:
            raise UsageError(
                f"the run's checkpoints were written by {wrote}; with {obstacle} {reads} cannot go on from them",
                hint=f"keep {before.job.nodes} × {before.processes_per_node} processes and deepspeed.profile: "
                f"{before.job.deepspeed.profile}, or submit a new run",
            )


def _describe_changes(before: ResolvedJob, after: ResolvedJob) -> tuple[str, ...]:
    """One line per key that differs, with its consequence."""
    old, new = (dict(flatten(r.job.model_dump(mode="json"))) for r in (before, after))
    lines = [
        f"{key}: {_show(old.get(key))} → {_show(new.get(key))}"
        + (f" (keeps the effective batch of {after.effective_batch_size})" if key == _ACCUMULATION else "")
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    wrote = Cut.of(before.ds_config, world_size=before.world_size)
    reads = Cut.of(after.ds_config, world_size=after.world_size)
    if after.job.kind == "train" and wrote != reads:
        lines.append(f"checkpoints of {wrote} are cut anew for {reads}")
    grown = any(old[key] != new[key] for key in _MAY_GROW)
    if grown and not after.job.training.lr_scheduler.startswith("constant"):
        lines.append(f"the learning rate follows a {after.job.training.lr_scheduler} over the new length from now on")
    return tuple(lines)


def _show(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
