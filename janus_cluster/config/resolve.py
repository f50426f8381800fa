"""A checked job becomes a ResolvedJob: all derived once, impossible combinations refused, nothing left to the nodes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from janus_cluster import __version__
from janus_cluster.config.load import LoadedJob
from janus_cluster.config.schema import JobConfig, MemoryPlan, ResolvedJob
from janus_cluster.config.weight_names import LANGUAGE_LINEAR_LAYERS
from janus_cluster.errors import UsageError
from janus_cluster.preflight.profile import load_profile
from janus_cluster.render.deepspeed import resolve_ds_config
from janus_cluster.render.deepspeed_lint import lint_ds_config
from janus_cluster.render.env import resolve_env, split_secrets
from janus_cluster.render.env_lint import lint_env
from janus_cluster.render.load import load_ds_profile, load_env_profile, load_nccl_variable_names
from janus_cluster.render.sbatch_options import resolve_sbatch_options
from janus_cluster.resources import templates_dir


def resolve_job(
    loaded: LoadedJob,
    *,
    run_dir: Path,
    cluster: Literal["slurm", "sandbox", "local"],
    environ: Mapping[str, str],
    cwd: Path,
    python: str,
    memory: MemoryPlan | None = None,
) -> ResolvedJob:
    """Every value that the nodes will use. Reads shipped templates only. `memory`: where `loaded` has its keys from.

    Raises: UsageError listing every combination that cannot work.
    """
    job = _absolute_paths(_apply_compat(loaded), cwd)
    processes = processes_per_node(job)
    world_size = job.nodes * processes
    problems = [f"{loaded.source}: {p}" for p in find_conflicts(job, processes_per_node=processes)]
    if problems:
        raise UsageError.of_many(problems)
    profile = preflight_profile(job)
    plain, secret = split_secrets({n: environ[n] for n in job.environment.forward if n in environ})
    env = resolve_env(
        load_env_profile(job.environment.profile),
        job.environment.variables,
        plain,
        profile_name=job.environment.profile,
        cpus_per_process=_cpus_per_process(job, processes),
    )
    ds_config = resolve_ds_config(load_ds_profile(job.deepspeed.profile), job, world_size=world_size)
    return ResolvedJob(
        janus_version=__version__,
        run_dir=str(run_dir),
        cluster=cluster,
        config_hash=hash_config(job),
        job=job,
        origins=loaded.origins,
        processes_per_node=processes,
        world_size=world_size,
        effective_batch_size=effective_batch_size(job, world_size=world_size),
        preflight_profile=profile,
        preflight_thresholds=load_profile(templates_dir(), profile),
        python=job.environment.python or python,
        sbatch_options=resolve_sbatch_options(job, run_dir=run_dir),
        env=env,
        secret_names=tuple(sorted(secret)),
        ds_config=ds_config,
        warnings=(
            *lint_env(env, known_nccl=load_nccl_variable_names()),
            *lint_ds_config(
                ds_config,
                world_size=world_size,
                overrides=job.deepspeed.overrides,
                device=job.hardware.device,
            ),
        ),
        memory=memory,
    )


def processes_per_node(job: JobConfig) -> int:
    """Ranks on each node: as the job says, else one per GPU, else one."""
    if job.hardware.processes_per_node is not None:
        return job.hardware.processes_per_node
    return max(1, job.hardware.gpus_per_node) if job.hardware.device == "cuda" else 1


def effective_batch_size(job: JobConfig, *, world_size: int) -> int:
    """Samples per optimizer step over all ranks."""
    t = job.training
    return t.per_device_batch_size * t.gradient_accumulation_steps * world_size


def preflight_profile(job: JobConfig) -> Literal["h800-ib", "h800-ethernet", "cpu"]:
    """The thresholds by which this job's nodes are judged."""
    if job.preflight.profile != "auto":
        return job.preflight.profile
    if job.hardware.device == "cpu":
        return "cpu"
    return "h800-ethernet" if job.environment.profile == "h800-ethernet" else "h800-ib"


def _cpus_per_process(job: JobConfig, processes: int) -> int | None:
    """CPUs for each rank where the job says how many a node's task gets; None: all of the node's."""
    cpus = job.slurm.get("cpus-per-task", job.slurm.get("cpus_per_task"))
    return max(1, cpus // processes) if isinstance(cpus, int) and not isinstance(cpus, bool) else None


def hash_config(job: JobConfig) -> str:
    """sha256 of the job's values: equal for equal jobs, whatever file they came from."""
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
            "environment.profile: cpu: hardware.device is cuda; allowed: h800-ib, h800-ethernet, janusvln-legacy"
        )
    if hw.device == "cpu" and env.profile != "cpu":
        found.append(f"environment.profile: {env.profile}: hardware.device is cpu; allowed: cpu")
    if job.data.min_pixels > job.data.max_pixels:
        found.append(f"data.min_pixels: {job.data.min_pixels}: more than data.max_pixels ({job.data.max_pixels})")
    if job.kind == "train":
        found += _training_conflicts(job)
        found += _batch_conflict(job, world_size=job.nodes * processes_per_node)
    return found


def _batch_conflict(job: JobConfig, *, world_size: int) -> list[str]:
    """The arithmetic against what the job says it means, with the two ways to make them agree."""
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
    """`compat: predecessor` sets what it stands for. Raises: UsageError where the job says otherwise itself."""
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


def _absolute_paths(job: JobConfig, cwd: Path) -> JobConfig:
    """Relative paths mean the submitter's folder, not wherever a node starts."""

    def absolute(path: str) -> str:
        return str(cwd / Path(path).expanduser())

    def optional(path: str | None) -> str | None:
        return None if path is None else absolute(path)

    def moved(places: Mapping[str, str]) -> dict[str, str]:
        return {place: absolute(here) for place, here in places.items()}

    return job.model_copy(
        update={
            "model": job.model.model_copy(
                update={"path": optional(job.model.path), "vggt_path": optional(job.model.vggt_path)}
            ),
            "data": job.data.model_copy(
                update={
                    "roots": [
                        r.model_copy(
                            update={
                                "path": absolute(r.path),
                                "images": optional(r.images),
                                "image_roots": moved(r.image_roots),
                            }
                        )
                        for r in job.data.roots
                    ],
                    "index_dir": optional(job.data.index_dir),
                    "image_roots": moved(job.data.image_roots),
                }
            ),
            "preflight": job.preflight.model_copy(
                update={
                    "require_paths": [absolute(p) for p in job.preflight.require_paths],
                    "sysfs_root": optional(job.preflight.sysfs_root),
                }
            ),
        }
    )
