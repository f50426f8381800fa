"""Jobs and setups as plan tests want them: 7B on nodes of eight ranks, one thing changed."""

from __future__ import annotations

from typing import Any

from janus_cluster.config.schema import JobConfig
from janus_cluster.plan.setup import Setup

RANKS = 8


def job(**keys: Any) -> JobConfig:
    """A job of the 7B preset; `a__b=v` sets a.b."""
    values: dict[str, Any] = {"name": "test"}
    for key, value in keys.items():
        *parents, last = key.split("__")
        below = values
        for parent in parents:
            below = below.setdefault(parent, {})
        below[last] = value
    return JobConfig.model_validate(values)


def setup(**keys: Any) -> Setup:
    return Setup.of(job(**keys), ranks_per_node=RANKS)
