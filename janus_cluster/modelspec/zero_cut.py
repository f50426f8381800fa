"""How DeepSpeed cuts the optimizer's state among the ranks, as far as a checkpoint's reader must know. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Equal for two that can read each other's files one to one."""

    world_size: int
    stage: int
    # Under ZeRO-3 a flat tensor ends at this size; under ZeRO-1 and 2 the other two decide its order and its gaps.
    sub_group_size: int | None = None
    is_round_robin: bool = False
    is_aligned: bool = False

    @classmethod
    def of(cls, ds_config: Mapping[str, Any], *, world_size: int) -> Cut:
        """The cut that DeepSpeed makes with this configuration."""
        zero = _zero(ds_config)
        stage = int(zero.get("stage", 0))
        is_flat = stage in (1, 2)
        return cls(
            world_size=world_size,
            stage=stage,
            sub_group_size=int(zero.get("sub_group_size", 1e9)) if stage == 3 else None,
            is_round_robin=is_flat and bool(zero.get("round_robin_gradients", False)),
            is_aligned=is_flat and bool(zero.get("parameter_alignment", False)),
        )

    def __str__(self) -> str:
        return f"{self.world_size} process{'es' * (self.world_size != 1)} under ZeRO-{self.stage}"


def find_obstacle(ds_config: Mapping[str, Any]) -> str | None:
    """The setting with which a state is neither written for others nor taken over from others; None: there is none."""
    zero = _zero(ds_config)
    if zero.get("elastic_checkpoint"):
        return "zero_optimization.elastic_checkpoint"
    for section in ("offload_optimizer", "offload_param"):
        if (zero.get(section) or {}).get("device") == "nvme":
            return f"zero_optimization.{section}.device: nvme"
    return None


def _zero(ds_config: Mapping[str, Any]) -> Mapping[str, Any]:
    zero = ds_config.get("zero_optimization")
    return zero if isinstance(zero, Mapping) else {}
