"""The resolved job, as resolved.json holds it: the job file's values and all that was derived from them.

No torch, no disk, no environment.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from janus_cluster.job.schema import JobConfig, Section


class EnvVar(Section):
    """One exported variable, why it is set, and who set it."""

    name: str
    value: str
    reason: str
    origin: str


class MemoryOption(Section):
    """One way to train within the memory. `keys` are those of the job that it decides, dotted."""

    keys: dict[str, Any]
    planned_gb: float
    step_s: float
    words: str


class MemoryPlan(Section):
    """Result of `training.memory: auto`. Each of `options` needs less than the one before it; `taken` counts from 0.

    Units: GB of 1e9 bytes. `out_of_memory_gb` what the smallest option was planned with that ran out of memory.
    """

    gpu: str
    gpu_memory_gb: float
    limit_gb: float
    options: tuple[MemoryOption, ...]
    reasons: tuple[str, ...]
    taken: int = 0
    out_of_memory_gb: float | None = None

    @property
    def option(self) -> MemoryOption:
        return self.options[self.taken]

    @property
    def next_option(self) -> MemoryOption | None:
        """What is tried where this one runs out of memory."""
        return self.options[self.taken + 1] if self.taken + 1 < len(self.options) else None

    def next_as_options(self) -> str | None:
        """What turns the job into `next_option` on the command line."""
        if self.next_option is None:
            return None
        now = self.option.keys
        return " ".join(f"--set {k}={str(v).lower()}" for k, v in self.next_option.keys.items() if now.get(k) != v)


class ResolvedJob(Section):
    """Everything derived, once, on the login node. Compute nodes read this and derive nothing again.

    `origins` maps a dotted key of `job` to its value's origin: `default`, `jobs/x.yaml:12`,
    `--set`, `--nodes`, `$MODEL_PATH (jobs/x.yaml:9)`.
    """

    schema_version: Literal[1] = 1
    janus_version: str
    run_dir: str
    # Of the run folder's bundles this one, and the one that follows where it runs out of memory before its first step.
    bundle: int = 1
    fallback_bundle: int | None = None
    cluster: Literal["slurm", "sandbox", "local"]
    config_hash: str
    job: JobConfig
    origins: dict[str, str]
    processes_per_node: int
    world_size: int
    effective_batch_size: int
    # nodes_min: number of nodes → the bundle for it.
    fewer_nodes: dict[int, int] = Field(default_factory=dict)
    preflight_profile: str
    preflight_thresholds: dict[str, Any] = Field(default_factory=dict)
    python: str
    sbatch_options: dict[str, str | None]
    env: tuple[EnvVar, ...]
    secret_names: tuple[str, ...]
    ds_config: dict[str, Any]
    warnings: tuple[str, ...]
    # None: training.memory is manual.
    memory: MemoryPlan | None = None
