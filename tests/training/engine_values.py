"""How a running DeepSpeed engine shows the value of each key of its JSON, and which key of a job gives it another one.

Read from the object that acts on the value, not from the parsed JSON: a key that nothing acts on has no row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.comm import comm
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer


@dataclass(frozen=True)
class Row:
    """`read` gives the engine's value in the JSON's own terms; `change` are keys of a job that alter it."""

    read: Callable[[Any], Any]
    change: Mapping[str, Any] = field(default_factory=dict)


def _stage(engine: Any) -> int:
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        return 3
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer):
        return 2 if engine.optimizer.partition_gradients else 1
    return 0


def _overlaps(engine: Any) -> bool:
    """ZeRO-3 overlaps where its reductions have a stream of their own."""
    if _stage(engine) < 3:
        return bool(engine.optimizer.overlap_comm)
    return engine.optimizer.reduce_and_partition_stream is not get_accelerator().default_stream()


def _offloads_optimizer(engine: Any) -> str:
    offloads = engine.optimizer.cpu_offload if _stage(engine) < 3 else engine.optimizer.offload_optimizer
    return "cpu" if offloads else "none"


def _coordinator(name: str) -> Callable[[Any], int]:
    """A limit of the object that gathers and releases ZeRO-3's weights."""
    private = f"_PartitionedParameterCoordinator__{name}"
    return lambda engine: int(getattr(engine.optimizer.parameter_offload.get_param_coordinator(), private))


def _zero(read: Callable[[Any], Any], key: str, other: Any) -> Row:
    return Row(read, {f"deepspeed.overrides.zero_optimization.{key}": other})


ROWS: dict[str, Row] = {
    "train_batch_size": Row(lambda e: e.tput_timer.batch_size, {"training.per_device_batch_size": 3}),
    "train_micro_batch_size_per_gpu": Row(
        lambda e: e.train_micro_batch_size_per_gpu(), {"training.per_device_batch_size": 3}
    ),
    "gradient_accumulation_steps": Row(
        lambda e: e.gradient_accumulation_steps(), {"training.gradient_accumulation_steps": 1}
    ),
    "gradient_clipping": Row(
        lambda e: getattr(e.optimizer, "clip_grad", e.gradient_clipping()), {"training.max_grad_norm": 0.5}
    ),
    "bf16.enabled": Row(
        lambda e: {p.dtype for p in e.module.parameters()} == {torch.bfloat16}, {"training.precision": "fp32"}
    ),
    "fp16.enabled": Row(lambda e: torch.float16 in {p.dtype for p in e.module.parameters()}),
    "wall_clock_breakdown": Row(
        lambda e: bool(e.engine_timers.forward_timers), {"deepspeed.overrides.wall_clock_breakdown": True}
    ),
    "timers.throughput.enabled": Row(
        lambda e: e.tput_timer.micro_step_count > 0, {"deepspeed.overrides.timers.throughput.enabled": True}
    ),
    "comms_logger.enabled": Row(
        lambda e: comm.comms_logger.enabled, {"deepspeed.overrides.comms_logger.enabled": True}
    ),
    "zero_force_ds_cpu_optimizer": Row(lambda e: type(e.basic_optimizer) is not torch.optim.AdamW),
    "zero_optimization.stage": Row(_stage),
    "zero_optimization.overlap_comm": _zero(_overlaps, "overlap_comm", False),
    "zero_optimization.contiguous_gradients": _zero(
        lambda e: e.optimizer.contiguous_gradients, "contiguous_gradients", False
    ),
    "zero_optimization.reduce_scatter": _zero(lambda e: e.optimizer.reduce_scatter, "reduce_scatter", False),
    "zero_optimization.reduce_bucket_size": _zero(
        lambda e: e.optimizer.reduce_bucket_size, "reduce_bucket_size", 40_000
    ),
    "zero_optimization.allgather_bucket_size": _zero(
        lambda e: e.optimizer.allgather_bucket_size, "allgather_bucket_size", 50_000
    ),
    "zero_optimization.sub_group_size": _zero(lambda e: e.optimizer.sub_group_size, "sub_group_size", 60_000),
    "zero_optimization.stage3_prefetch_bucket_size": _zero(
        _coordinator("prefetch_bucket_sz"), "stage3_prefetch_bucket_size", 70_000
    ),
    "zero_optimization.stage3_param_persistence_threshold": _zero(
        lambda e: e.optimizer.parameter_offload.param_numel_persistence_threshold,
        "stage3_param_persistence_threshold",
        80,
    ),
    "zero_optimization.stage3_max_live_parameters": _zero(
        _coordinator("max_n_available_params"), "stage3_max_live_parameters", 90_000
    ),
    "zero_optimization.stage3_max_reuse_distance": _zero(
        _coordinator("max_reuse_dist_in_numel"), "stage3_max_reuse_distance", 10_000
    ),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _zero(
        lambda e: e.zero_gather_16bit_weights_on_model_save(), "stage3_gather_16bit_weights_on_model_save", False
    ),
    "zero_optimization.offload_optimizer.device": _zero(_offloads_optimizer, "offload_optimizer.device", "none"),
    "zero_optimization.offload_optimizer.pin_memory": _zero(
        lambda e: e.optimizer.cpu_offload_pin_memory, "offload_optimizer.pin_memory", False
    ),
    "zero_optimization.offload_param.device": _zero(
        lambda e: str(e.optimizer.parameter_offload.offload_device or "none"), "offload_param.device", "cpu"
    ),
}
# Documented as doing nothing: no row, no place in a shipped JSON, and a warning where a job sets one.
WITHOUT_EFFECT = frozenset(["steps_per_print", "zero_optimization.allgather_partitions"])


def leaves(section: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of a DeepSpeed JSON with their single values."""
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def live_values(engine: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's value of every key in `config` that has a row; a text where nothing in the engine has one."""
    return {key: _read(key, engine) for key, _ in leaves(config) if key in ROWS}


def _read(key: str, engine: Any) -> Any:
    try:
        return ROWS[key].read(engine)
    except AttributeError as e:
        return f"nothing acts on it: {e}"
