"""Jobs and setups as plan tests want them: 7B on nodes of eight ranks, one thing changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from janus_cluster.job.schema import JobConfig
from janus_cluster.modelspec.sizes import Sizes
from janus_cluster.plan.hardware import Gpu
from janus_cluster.plan.sample import Sample
from janus_cluster.plan.setup import Setup
from janus_cluster.plan.time import plan_step

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


def node_gain(sizes: Sizes, sample: Sample, one: Setup, gpu: Gpu, *, same_batch: bool) -> float:
    """How many times the samples per second of one node two nodes bring.

    With the same effective batch each rank does half the micro-steps; else the batch doubles with the ranks.
    """
    two = replace(one, nodes=2, accumulation=max(1, one.accumulation // 2) if same_batch else one.accumulation)
    seconds = [plan_step(sizes, sample, s, gpu).total for s in (one, two)]
    return (two.effective_batch / seconds[1]) / (one.effective_batch / seconds[0])
