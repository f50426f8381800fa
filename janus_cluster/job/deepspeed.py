"""Build DeepSpeed's JSON from a shipped ZeRO profile and the job's training section. Pure functions.

Every number is filled here, on the login node: `auto` would leave it to be guessed on the compute nodes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from janus_cluster.errors import UsageError
from janus_cluster.job.nearest import did_you_mean
from janus_cluster.job.schema import JobConfig

# Keys of zero_optimization in DeepSpeed 0.18 and 0.19, by kind. DeepSpeed refuses 5e8 (a float) for a whole number.
INTEGER_KEYS = frozenset(
    [
        "allgather_bucket_size",
        "reduce_bucket_size",
        "stage",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "sub_group_size",
        "zero_hpz_partition_size",
    ]
)
SWITCH_KEYS = frozenset(
    [
        "allgather_partitions",
        "compute_grad_norm",
        "contiguous_gradients",
        "elastic_checkpoint",
        "ignore_unused_parameters",
        "legacy_stage1",
        "enable_sanity_checks",
        "load_from_fp32_weights",
        "log_trace_cache_warnings",
        "memory_efficient_linear",
        "override_module_apply",
        "overlap_comm",
        "parameter_alignment",
        "pipeline_loading_checkpoint",
        "save_muon_momentum_buffer_in_memory",
        "reduce_scatter",
        "round_robin_gradients",
        "stage3_allgather_sequential",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_use_all_reduce_for_fetch_params",
        "use_multi_rank_bucket_allreduce",
        "zero_quantized_gradients",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_weights",
    ]
)
SECTION_KEYS = frozenset(["offload_optimizer", "offload_param"])
OTHER_KEYS = frozenset(["leaf_module", "zenflow"])

# Sections that DeepSpeed 0.19 switches on when present in the JSON, for every value of `enabled` (comm/config.py).
ON_WHEN_PRESENT = ("comms_logger",)

# With gloo and tiny models: DeepSpeed allocates whole buckets, and 5e8 fp32 numbers are 2 GB on every rank.
_CPU_BUCKETS = {
    "reduce_bucket_size": 5_000_000,
    "allgather_bucket_size": 5_000_000,
    "stage3_prefetch_bucket_size": 5_000_000,
    "stage3_param_persistence_threshold": 10_000,
}


def resolve_ds_config(profile: Mapping[str, Any], job: JobConfig, *, world_size: int) -> dict[str, Any]:
    """The complete DeepSpeed configuration, with no `auto` left; deepspeed.overrides override the profile.

    Raises: UsageError for an unknown key, a wrong type, or an override that contradicts the training section.
    """
    config: dict[str, Any] = {}
    fixed = _fixed_by_training(job, world_size)
    for key, (value, _) in fixed.items():
        _put(config, key, value)
    config |= copy.deepcopy(dict(profile))
    if job.hardware.device == "cpu":
        _fit_cpu(config)
    problems = []
    for key, value in job.deepspeed.overrides.items():
        try:
            _override(config, key, value, fixed)
        except ValueError as e:
            problems.append(f"deepspeed.overrides.{key}: {e}")
    if problems:
        raise UsageError.of_many(problems, hint="the keys are those of DeepSpeed's configuration JSON, joined by dots")
    for section in ON_WHEN_PRESENT:
        if section in config and _is_switched_off(config[section]):
            del config[section]
    if _offloads_optimizer(config):
        # The trainer brings its own AdamW, one learning rate per group; otherwise DeepSpeed insists on its own here.
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    return config


def _is_switched_off(section: Any) -> bool:
    """Whether a section of DeepSpeed's JSON asks for off: false, null, or a mapping whose `enabled` is false."""
    return not section.get("enabled", True) if isinstance(section, Mapping) and section else not section


def _fixed_by_training(job: JobConfig, world_size: int) -> dict[str, tuple[Any, str]]:
    """Dotted DeepSpeed keys that the job's own sections decide, with the value and where it is set."""
    training = job.training
    micro, accumulation = training.per_device_batch_size, training.gradient_accumulation_steps
    return {
        "train_batch_size": (
            micro * accumulation * world_size,
            f"training.per_device_batch_size × gradient_accumulation_steps × {world_size} ranks",
        ),
        "train_micro_batch_size_per_gpu": (micro, "training.per_device_batch_size"),
        "gradient_accumulation_steps": (accumulation, "training.gradient_accumulation_steps"),
        "gradient_clipping": (training.max_grad_norm, "training.max_grad_norm"),
        "bf16.enabled": (training.precision == "bf16", "training.precision"),
        "fp16.enabled": (False, "training.precision"),
    }


def _fit_cpu(config: dict[str, Any]) -> None:
    """Small buckets, no streams, no pinned memory: what DeepSpeed needs to run on the CPU with gloo."""
    zero = config["zero_optimization"]
    for key, most in _CPU_BUCKETS.items():
        if key in zero:
            zero[key] = min(zero[key], most)
    if zero.get("stage"):
        zero["overlap_comm"] = False
    for section in SECTION_KEYS & set(zero):
        zero[section]["pin_memory"] = False


def _override(config: dict[str, Any], key: str, value: Any, fixed: Mapping[str, tuple[Any, str]]) -> None:
    """Put one dotted override in; null takes the key out. Raises: ValueError."""
    top, _, rest = key.partition(".")
    if top in ("optimizer", "scheduler"):
        raise ValueError("the training section decides it (learning_rate, lr_scheduler, adam_beta1, …)")
    if isinstance(value, str) and value.lower() == "auto":
        raise ValueError("'auto' leaves the value to be guessed on the nodes; write a number or leave the key out")
    for fixed_key, (fixed_value, source) in fixed.items():
        if key == fixed_key and value != fixed_value:
            raise ValueError(f"{value!r} contradicts {source}, which gives {fixed_value!r}; change that one")
        if fixed_key.startswith(f"{key}."):
            raise ValueError(f"a whole section; {source} decides {fixed_key}. Give single keys below it")
    if top == "zero_optimization":
        value = _checked_zero_value(rest, value)
    if key in ON_WHEN_PRESENT and value is True:
        raise ValueError(f"a section, not a switch; write {key}.enabled: true")
    if value is None:
        _take_out(config, key)
    else:
        _put(config, key, value)


def _checked_zero_value(rest: str, value: Any) -> Any:
    """The value as DeepSpeed takes it. Raises: ValueError with the nearest key, or what is allowed."""
    name, _, below = rest.partition(".")
    known = INTEGER_KEYS | SWITCH_KEYS | SECTION_KEYS | OTHER_KEYS
    if not name:
        raise ValueError("a whole section; give single keys below it")
    if name not in known:
        guess = did_you_mean(name, known) or f"; known: {', '.join(sorted(known))}"
        raise ValueError(f"zero_optimization has no key {name!r}{guess}")
    if below and name in INTEGER_KEYS | SWITCH_KEYS:
        raise ValueError(f"{name} is a single value and has no keys below it")
    if value is None or below:
        return value
    if name in INTEGER_KEYS:
        return _whole_number(value)
    if name in SWITCH_KEYS and not isinstance(value, bool):
        raise ValueError(f"{value!r} is not allowed; allowed: true, false")
    return value


def _whole_number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1 or value < 0:
        raise ValueError(f"{value!r} is not a whole number ≥ 0 (5e8 is fine)")
    return int(value)


def _offloads_optimizer(config: Mapping[str, Any]) -> bool:
    offload = config["zero_optimization"].get("offload_optimizer")
    return bool(offload) and offload.get("device", "none") != "none"


def _put(config: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        below = config.setdefault(parent, {})
        if not isinstance(below, dict):
            raise ValueError(f"{parent} is a single value here and has no keys below it")
        config = below
    config[last] = value


def _take_out(config: dict[str, Any], dotted: str) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        config = config.get(parent, {})
    config.pop(last, None)
