"""Resolve a checked job into a ResolvedJob: derive every value once, refuse impossible combinations."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel

from janus_cluster import __version__
from janus_cluster.errors import UsageError
from janus_cluster.job.deepspeed import resolve_ds_config
from janus_cluster.job.deepspeed_lint import lint_ds_config
from janus_cluster.job.env import resolve_env, split_secrets
from janus_cluster.job.env_lint import lint_env
from janus_cluster.job.home import site_dir
from janus_cluster.job.load import LoadedJob, with_values
from janus_cluster.job.nearest import did_you_mean
from janus_cluster.job.profiles import (
    find_profile,
    is_path,
    load_env_profile,
    load_part,
    load_preflight_profile,
    nearest_gate,
    profile_names,
)
from janus_cluster.job.resolved import EnvVar, MemoryPlan, ResolvedJob
from janus_cluster.job.sbatch_options import resolve_sbatch_options, warn_of_few_cpus
from janus_cluster.job.schema import IS_PATH, LANGUAGE_LINEAR_LAYERS, JobConfig
from janus_cluster.job.setup import warn_of_interpreter
from janus_cluster.job.templates import load_ds_profile, load_nccl_variable_names
from janus_cluster.job.thresholds import with_thresholds
from janus_cluster.job.walltime import find_time_conflicts, warn_of_times

SectionT = TypeVar("SectionT", bound=BaseModel)


def resolve_job(
    loaded: LoadedJob,
    *,
    run_dir: Path,
    cluster: Literal["slurm", "sandbox", "local"],
    environ: Mapping[str, str],
    cwd: Path,
    python: str,
    memory: MemoryPlan | None = None,
    bundle: int = 1,
) -> ResolvedJob:
    """Every value that the nodes will use. Reads profiles and templates only. `memory`: the plan behind `loaded`.

    Raises: UsageError listing every combination that cannot work.
    """
    job = with_absolute_paths(_apply_compat(loaded), cwd)
    processes = processes_per_node(job)
    world_size = job.nodes * processes
    _require_none(find_conflicts(job, processes_per_node=processes), loaded.source)
    site = site_dir(environ)
    _find_profiles(loaded, job, site)
    profile = preflight_profile(job, site=site)
    env, secret_names = _resolve_variables(job, environ, site)
    ds_config = resolve_ds_config(load_ds_profile(job.deepspeed.profile), job, world_size=world_size)
    options = resolve_sbatch_options(job, run_dir=run_dir)
    warnings = [
        *_warn_of_gpu(job, site),
        *lint_env(env, known_nccl=load_nccl_variable_names()),
        *lint_ds_config(
            ds_config, world_size=world_size, overrides=job.deepspeed.overrides, device=job.hardware.device
        ),
        *warn_of_interpreter(job.environment.setup, python=python, is_own=job.environment.python is not None),
    ]
    if cluster != "local":
        _require_none(find_time_conflicts(options), loaded.source)
        warnings += warn_of_times(options, job.restart)
        warnings += warn_of_few_cpus(options, ranks=processes, workers=job.data.num_workers)
    return ResolvedJob(
        janus_version=__version__,
        run_dir=str(run_dir),
        bundle=bundle,
        cluster=cluster,
        config_hash=hash_config(job),
        job=job,
        origins=loaded.origins,
        processes_per_node=processes,
        world_size=world_size,
        effective_batch_size=effective_batch_size(job, world_size=world_size),
        preflight_profile=profile,
        preflight_thresholds=_thresholds(job, profile, site),
        python=job.environment.python or python,
        sbatch_options=options,
        env=env,
        secret_names=secret_names,
        ds_config=ds_config,
        warnings=tuple(warnings),
        memory=memory,
    )


def _require_none(problems: Iterable[str], source: str) -> None:
    if found := [f"{source}: {problem}" for problem in problems]:
        raise UsageError.of_many(found)


def _resolve_variables(
    job: JobConfig, environ: Mapping[str, str], site: Path
) -> tuple[tuple[EnvVar, ...], tuple[str, ...]]:
    """Every variable of the ranks with its origin, and the names of those that only secrets.env has."""
    plain, secret = split_secrets({n: environ[n] for n in job.environment.forward if n in environ})
    env = resolve_env(
        load_env_profile(job.environment.profile, site=site),
        job.environment.variables,
        plain,
        cpus_per_process=_cpus_per_process(job, processes_per_node(job)),
    )
    return env, tuple(sorted(secret))


def resolve_fallbacks(resolved: ResolvedJob) -> tuple[ResolvedJob, ...]:
    """The job and after it every smaller option of training.memory: auto, each in a bundle of its own, naming the next.

    One without smaller options is alone.
    """
    memory = resolved.memory
    if memory is None:
        return (resolved,)
    chain = [resolved]
    for taken in range(memory.taken + 1, len(memory.options)):
        before = chain[-1]
        number = before.bundle + 1
        chain[-1] = before.model_copy(update={"fallback_bundle": number})
        job = with_values(resolved.job, memory.options[taken].keys)
        update = {
            "bundle": number,
            "config_hash": hash_config(job),
            "job": job,
            "ds_config": resolve_ds_config(load_ds_profile(job.deepspeed.profile), job, world_size=resolved.world_size),
            "memory": memory.model_copy(update={"taken": taken}),
        }
        chain.append(before.model_copy(update=update))
    return tuple(chain)


def processes_per_node(job: JobConfig) -> int:
    """Ranks on each node: the job's value, else one per GPU, else one."""
    if job.hardware.processes_per_node is not None:
        return job.hardware.processes_per_node
    return max(1, job.hardware.gpus_per_node) if job.hardware.device == "cuda" else 1


def effective_batch_size(job: JobConfig, *, world_size: int) -> int:
    """Samples per optimizer step over all ranks."""
    t = job.training
    return t.per_device_batch_size * t.gradient_accumulation_steps * world_size


def preflight_profile(job: JobConfig, *, site: Path | None = None) -> str:
    """The profile by which this job's nodes are judged: a name or a path."""
    if job.preflight.profile != "auto":
        return job.preflight.profile
    return "cpu" if job.hardware.device == "cpu" else nearest_gate(job.environment.profile, site=site)


def _thresholds(job: JobConfig, profile: str, site: Path) -> dict[str, Any]:
    """What a sound node of this job is: the profile with the job's own changes."""
    changes = job.preflight.thresholds
    part = None
    if isinstance(changes.get("part"), str):
        part = load_part(changes["part"], site=site, key="preflight.thresholds.part")
    return with_thresholds(load_preflight_profile(profile, site=site), changes, name=profile, part=part)


def _warn_of_gpu(job: JobConfig, site: Path) -> tuple[str, ...]:
    """A kind of GPU without figures: it may be a Slurm's own spelling, or a slip."""
    name, known = job.hardware.gpu_type, profile_names("gpu", site)
    if job.hardware.device == "cpu" or not name or is_path(name) or name.lower() in known:
        return ()
    return (
        f"hardware.gpu_type: {name}: no figures of this kind of GPU{did_you_mean(name, known)} (known: "
        f"{', '.join(known)}); a spelling of Slurm's? --set slurm.gres=gpu:{name}:{job.hardware.gpus_per_node}",
    )


def _find_profiles(loaded: LoadedJob, job: JobConfig, site: Path) -> None:
    """Raises: UsageError naming each key whose profile does not exist, and those that do."""
    problems, hints = [], []
    wanted = [("environment.profile", "env", job.environment.profile)]
    if job.preflight.profile != "auto":
        wanted.append(("preflight.profile", "preflight", job.preflight.profile))
    if is_path(job.hardware.gpu_type):
        wanted.append(("hardware.gpu_type", "gpu", job.hardware.gpu_type))
    for key, folder, name in wanted:
        try:
            find_profile(folder, name, site=site)  # type: ignore[arg-type]
        except UsageError as e:
            problems.append(f"{loaded.origins.get(key, loaded.source)}: {e.message}")
            hints.append(e.hint)
    if problems:
        raise UsageError.of_many(problems, hint=hints[0])


def _cpus_per_process(job: JobConfig, processes: int) -> int | None:
    """CPUs for each rank where the job sets those of a node's task; None: all of the node's."""
    cpus = job.slurm.get("cpus-per-task", job.slurm.get("cpus_per_task"))
    return max(1, int(cpus) // processes) if isinstance(cpus, str) and cpus.isdecimal() else None


def hash_config(job: JobConfig) -> str:
    """sha256 of the job's values: equal for equal jobs from any file."""
    canonical = json.dumps(job.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def find_conflicts(job: JobConfig, *, processes_per_node: int) -> list[str]:
    """Combinations that cannot work, each as `key: value: what is wrong and what to type`."""
    hw, env = job.hardware, job.environment
    found: list[str] = []
    if hw.device == "cuda" and processes_per_node > hw.gpus_per_node:
        found.append(
            f"hardware.processes_per_node: {processes_per_node}: more ranks than GPUs (hardware.gpus_per_node: "
            f"{hw.gpus_per_node}); allowed: 1 to {hw.gpus_per_node}"
        )
    if hw.device == "cuda" and env.profile == "cpu":
        found.append(
            "environment.profile: cpu: hardware.device is cuda; "
            f"allowed: {', '.join(name for name in profile_names('env') if name != 'cpu')}"
        )
    if hw.device == "cpu" and env.profile != "cpu":
        found.append(f"environment.profile: {env.profile}: hardware.device is cpu; allowed: cpu")
    if job.nodes_min is not None and job.nodes_min > job.nodes:
        found.append(
            f"nodes_min: {job.nodes_min}: more than nodes ({job.nodes}); type --set nodes_min={job.nodes}, or "
            f"--nodes {job.nodes_min}"
        )
    if job.data.min_pixels > job.data.max_pixels:
        found.append(f"data.min_pixels: {job.data.min_pixels}: more than data.max_pixels ({job.data.max_pixels})")
    if job.kind == "train":
        found += _training_conflicts(job)
        found += _batch_conflict(job, world_size=job.nodes * processes_per_node)
    return found


def _batch_conflict(job: JobConfig, *, world_size: int) -> list[str]:
    """The batch arithmetic against the job's effective_batch_size, with the two ways to make them agree."""
    t = job.training
    wanted, real = t.effective_batch_size, effective_batch_size(job, world_size=world_size)
    if wanted is None or wanted == real:
        return []
    per_step = t.per_device_batch_size * world_size
    way = (
        f"--set training.gradient_accumulation_steps={wanted // per_step}"
        if wanted % per_step == 0
        else f"another per_device_batch_size ({per_step} samples per micro-step do not divide {wanted})"
    )
    return [
        f"training.effective_batch_size: {wanted}: per_device_batch_size {t.per_device_batch_size} × "
        f"gradient_accumulation_steps {t.gradient_accumulation_steps} × {world_size} ranks is {real}. "
        f"Type {way}, or --set training.effective_batch_size={real}"
    ]


def _training_conflicts(job: JobConfig) -> list[str]:
    found: list[str] = []
    if not job.data.roots:
        found.append("data.roots: must be given: folders of episode folders, e.g. --set data.roots=[/data/r2r]")
    if job.model.preset != "tiny":
        for key, value in (("path", job.model.path), ("vggt_path", job.model.vggt_path)):
            if value is None:
                found.append(
                    f"model.{key}: must be given for preset {job.model.preset}, e.g. --set model.{key}=/models/…"
                )
    weights = job.training.segment_weights.model_dump().values()
    if not any(weights) and not job.training.action_loss_weight:
        found.append("training.segment_weights: all 0, and action_loss_weight is 0: nothing would be learnt")
    if not any(job.training.tune.model_dump().values()):
        found.append("training.tune: all false: nothing would be learnt")
    return found + _lora_conflicts(job)


def _lora_conflicts(job: JobConfig) -> list[str]:
    lora, found = job.training.lora, []
    if not lora.enabled:
        return []
    unknown = [name for name in lora.target_modules if name not in LANGUAGE_LINEAR_LAYERS]
    if unknown or not lora.target_modules:
        found.append(
            f"training.lora.target_modules: {', '.join(unknown) or 'empty'}: no linear layer of the language model; "
            f"allowed: {', '.join(LANGUAGE_LINEAR_LAYERS)}"
        )
    if not job.training.tune.llm:
        found.append("training.lora.enabled: true: tune.llm is false, so the adapters would not learn; set it to true")
    return found


def _apply_compat(loaded: LoadedJob) -> JobConfig:
    """Apply the settings of `compat: predecessor`. Raises: UsageError where the job contradicts one."""
    job = loaded.config
    if job.compat == "none":
        return job
    implied = {
        "data.image_mode": (job.data.image_mode, "pad"),
        "model.reference_frame": (job.model.reference_frame, "last"),
    }
    against = [
        f"{loaded.origins[key]}: {key}: {value}: compat: predecessor means {means}"
        for key, (value, means) in implied.items()
        if value != means and loaded.origins.get(key, "default") != "default"
    ]
    if against:
        raise UsageError.of_many(against, hint="take the key out, or set compat: none")
    return job.model_copy(
        update={
            "data": job.data.model_copy(update={"image_mode": "pad"}),
            "model": job.model.model_copy(update={"reference_frame": "last"}),
        }
    )


def with_absolute_paths(section: SectionT, cwd: Path) -> SectionT:
    """The same where a relative path means one below `cwd`, not below wherever a node starts or a user types next."""
    fields = type(section).model_fields
    changes = {
        name: changed
        for name, value in section
        if (changed := _absolute(value, cwd, is_path=IS_PATH in fields[name].metadata)) != value
    }
    # Only what changes: a key that was not given stays one that was not given.
    return section.model_copy(update=changes) if changes else section


def _absolute(value: Any, cwd: Path, *, is_path: bool) -> Any:
    if isinstance(value, BaseModel):
        return with_absolute_paths(value, cwd)
    if isinstance(value, list):
        return [_absolute(each, cwd, is_path=is_path) for each in value]
    if isinstance(value, dict):
        return {key: _absolute(each, cwd, is_path=is_path) for key, each in value.items()}
    return str(cwd / Path(os.path.expanduser(value))) if is_path and isinstance(value, str) else value
