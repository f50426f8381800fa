"""What is doubtful about a DeepSpeed configuration. Warnings only; nothing is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from janus_cluster.job.deepspeed import ON_WHEN_PRESENT

# Buckets above this share of a GPU's memory are worth a line: states and activations of the 7B model take the rest.
_BUCKET_SHARE = 0.25
_GPU_MEMORY_GB = 80.0
# Copies of the buckets that live at once while communication overlaps (transformers' DeepSpeed guide, ZeRO-2).
_OVERLAP_COPIES = 4.5
_GB = 1e9
# ZeRO stages in which a key acts; those that begin with stage3_ act in stage 3. Without stages (0), none does.
_ACTS_IN = {
    "allgather_bucket_size": (1, 2),
    "allgather_partitions": (),  # read by nothing in DeepSpeed 0.19
    "round_robin_gradients": (1, 2),
    "sub_group_size": (3,),
}


def lint_ds_config(
    config: Mapping[str, Any],
    *,
    world_size: int,
    overrides: Mapping[str, Any] | None = None,
    device: str = "cuda",
) -> list[str]:
    """One line per doubtful setting: the keys, their values, what follows and what to do.

    `overrides` are the job's deepspeed.overrides, some of which `config` no longer shows.
    Units: 1 GB = 1e9 bytes.
    """
    zero = config["zero_optimization"]
    warnings = [*_lint_stage(zero, world_size), *_lint_offload(zero, device), *_lint_batch(config, world_size)]
    warnings += _lint_on_when_present(config, overrides or {})
    if device == "cuda":
        warnings += _lint_buckets(config)
    warnings += [
        f"{key}: true measures every step with device synchronisation and slows it; for a short profile only"
        for key in ("wall_clock_breakdown", "memory_breakdown")
        if config.get(key)
    ]
    if not _timer_is_off(config):
        warnings.append(
            "timers.throughput.enabled: true waits for the device before and after every micro-step, for a rate that "
            "nothing prints; set it to false"
        )
    if "steps_per_print" in config:
        warnings.append("steps_per_print: accelerate replaces it by infinity, so it does nothing; leave it out")
    return warnings


def bucket_memory_gb(config: Mapping[str, Any]) -> dict[str, float]:
    """GB per GPU that each bucket setting can hold at once, by key.

    Units:  1 GB = 1e9 bytes; 2 bytes per number in bf16 or fp16, else 4.
    Source: transformers' DeepSpeed guide: with overlap_comm, ZeRO-2 holds 4.5 times both buckets.
    """
    zero = config["zero_optimization"]
    half = any((config.get(key) or {}).get("enabled") for key in ("bf16", "fp16"))
    number_gb = (2 if half else 4) / _GB
    stage = zero.get("stage", 0)
    overlap = zero.get("overlap_comm", stage == 3)
    if stage == 3:
        copies = {
            "reduce_bucket_size": 2.0 if overlap else 1.0,
            "stage3_prefetch_bucket_size": 1.0,
            "stage3_max_live_parameters": 1.0,
        }
    else:
        each = _OVERLAP_COPIES if overlap else 1.0
        copies = {"reduce_bucket_size": each, "allgather_bucket_size": each}
    return {key: zero[key] * number_gb * factor for key, factor in copies.items() if key in zero}


def _timer_is_off(config: Mapping[str, Any]) -> bool:
    timer = (config.get("timers") or {}).get("throughput") or {}
    return not timer.get("enabled", True) or not timer.get("synchronized", True)


def _lint_on_when_present(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> list[str]:
    """The sections that are on, and those that an override was to switch off, which takes leaving them out."""
    warnings = []
    for section in ON_WHEN_PRESENT:
        does = f"DeepSpeed switches {section} on where the key is present, for every value of `enabled`"
        given = [key for key in overrides if key.partition(".")[0] == section]
        if section in config:
            warnings.append(
                f"{', '.join(given) or section}: {does}, and waits for the device after every collective, so that "
                "overlap_comm hides nothing; for a short profile only"
            )
        elif any(overrides[key] is not None for key in given):
            warnings.append(f"{', '.join(given)}: {does}; it is left out of the JSON here. Remove the override")
    return warnings


def _lint_stage(zero: Mapping[str, Any], world_size: int) -> list[str]:
    stage = zero.get("stage", 0)
    warnings = []
    everywhere = (1, 2, 3)
    idle = [k for k in zero if stage not in ((3,) if k.startswith("stage3_") else _ACTS_IN.get(k, everywhere))]
    idle = sorted(key for key in idle if key not in ("stage", "offload_param", "offload_optimizer"))
    if idle:
        use = "; use deepspeed.profile zero3" if any(key.startswith("stage3_") for key in idle) else ""
        warnings.append(f"{', '.join(idle)}: do nothing under zero_optimization.stage {stage}{use}")
    if stage and world_size == 1:
        warnings.append(
            f"zero_optimization.stage {stage} with 1 rank: there is nothing to shard over, only its cost remains"
        )
    return warnings


def _lint_offload(zero: Mapping[str, Any], device: str) -> list[str]:
    stage = zero.get("stage", 0)
    warnings = []
    param = (zero.get("offload_param") or {}).get("device", "none")
    if param != "none" and stage < 3:
        warnings.append(
            f"zero_optimization.offload_param.device: {param} does nothing under stage {stage}, because only stage 3 "
            "shards the parameters; use deepspeed.profile zero3, or leave it out"
        )
    optimizer = (zero.get("offload_optimizer") or {}).get("device", "none")
    if optimizer != "none" and device == "cpu":
        warnings.append("zero_optimization.offload_optimizer: training already computes on the CPU; it saves nothing")
    elif optimizer != "none":
        warnings.append(
            "zero_optimization.offload_optimizer: the optimizer step runs on the CPU with torch's AdamW, many times "
            "slower than on the GPU; use it only where zero2 and zero3 do not fit"
        )
    return warnings


def _lint_batch(config: Mapping[str, Any], world_size: int) -> list[str]:
    micro, accumulation = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]
    total, product = config["train_batch_size"], micro * accumulation * world_size
    if total == product:
        return []
    return [
        f"train_batch_size {total} is not {micro} (train_micro_batch_size_per_gpu) × {accumulation} "
        f"(gradient_accumulation_steps) × {world_size} ranks = {product}; DeepSpeed refuses that"
    ]


def _lint_buckets(config: Mapping[str, Any]) -> list[str]:
    parts = bucket_memory_gb(config)
    total_gb = sum(parts.values())
    if total_gb <= _BUCKET_SHARE * _GPU_MEMORY_GB:
        return []
    each = ", ".join(f"{key} {size_gb:.1f}" for key, size_gb in parts.items())
    return [
        f"ZeRO buckets may hold {total_gb:.1f} GB of a GPU's {_GPU_MEMORY_GB:.0f} GB ({each}); "
        f"more than {_BUCKET_SHARE:.0%} leaves too little for activations. Lower them under deepspeed.overrides"
    ]
