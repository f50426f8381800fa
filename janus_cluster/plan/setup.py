"""How a job trains, as far as memory and time depend on it: ZeRO stage, batch, recomputing, buckets. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from janus_cluster.job.deepspeed import resolve_ds_config
from janus_cluster.job.schema import JobConfig
from janus_cluster.job.templates import load_ds_profile
from janus_cluster.plan.flops import Work

# DeepSpeed's own defaults for what a profile leaves out.
_REDUCE_BUCKET = 500_000_000
_LIVE_PARAMETERS = 1_000_000_000
_PREFETCH_BUCKET = 50_000_000
_PERSISTENCE_THRESHOLD = 100_000


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One way to train. `element_bytes` is 2 in bf16 and 4 in fp32; buckets are numbers of elements."""

    nodes: int
    ranks_per_node: int
    stage: int
    offload_optimizer: bool
    offload_parameters: bool
    micro_batch: int
    accumulation: int
    element_bytes: int
    work: Work
    overlap: bool = True
    reduce_bucket: int = _REDUCE_BUCKET
    live_parameters: int = _LIVE_PARAMETERS
    prefetch_bucket: int = _PREFETCH_BUCKET
    persistence_threshold: int = _PERSISTENCE_THRESHOLD

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def effective_batch(self) -> int:
        return self.micro_batch * self.accumulation * self.world_size

    @classmethod
    def of(cls, job: JobConfig, *, ranks_per_node: int) -> Setup:
        """The setup of a job as it would be rendered. Raises: UsageError for DeepSpeed keys that cannot be."""
        training, world_size = job.training, job.nodes * ranks_per_node
        config = resolve_ds_config(load_ds_profile(job.deepspeed.profile), job, world_size=world_size)
        zero: Mapping[str, Any] = config["zero_optimization"]
        stage = int(zero.get("stage", 0))
        return cls(
            nodes=job.nodes,
            ranks_per_node=ranks_per_node,
            stage=stage,
            offload_optimizer=_is_offloaded(zero, "offload_optimizer"),
            # Only stage 3 cuts parameters; below it DeepSpeed ignores the section.
            offload_parameters=stage == 3 and _is_offloaded(zero, "offload_param"),
            micro_batch=training.per_device_batch_size,
            accumulation=training.gradient_accumulation_steps,
            element_bytes=2 if training.precision == "bf16" else 4,
            work=Work(
                tune=training.tune,
                lora=training.lora,
                recompute_every=training.gradient_checkpointing_every if training.gradient_checkpointing else 0,
            ),
            overlap=bool(zero.get("overlap_comm", stage == 3)),
            reduce_bucket=int(zero.get("reduce_bucket_size", _REDUCE_BUCKET)),
            live_parameters=int(zero.get("stage3_max_live_parameters", _LIVE_PARAMETERS)),
            prefetch_bucket=int(zero.get("stage3_prefetch_bucket_size", _PREFETCH_BUCKET)),
            persistence_threshold=int(zero.get("stage3_param_persistence_threshold", _PERSISTENCE_THRESHOLD)),
        )


def _is_offloaded(zero: Mapping[str, Any], section: str) -> bool:
    return str((zero.get(section) or {}).get("device", "none")) != "none"
