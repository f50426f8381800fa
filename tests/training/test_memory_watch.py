"""The measured peak beside the planned one: the line, and when it is a warning."""

from __future__ import annotations

import shlex

import pytest

from janus_cluster.job.resolved import MemoryOption, MemoryPlan
from janus_cluster.training.memory import NEARLY_FULL, compare_memory

pytestmark = pytest.mark.train

FULL_GB = 85.5


def plan(taken: int = 0) -> MemoryPlan:
    options = [
        MemoryOption(
            keys={"training.per_device_batch_size": batch, "deepspeed.profile": "zero2"},
            planned_gb=planned_gb, step_s=5.0, words=f"zero2, batch {batch}",
        )
        for batch, planned_gb in ((2, 61.2), (1, 50.0))
    ]  # fmt: skip
    return MemoryPlan(gpu="H800", gpu_memory_gb=80, limit_gb=74, options=tuple(options), reasons=(), taken=taken)


def test_the_fullest_rank_is_named_beside_the_plan() -> None:
    event = compare_memory(plan(), peaks_gb=[50.0, 52.5, 51.0, 58.9], gpu_gb=FULL_GB, resume="janus-cluster resume r")
    assert (event.planned_gb, event.measured_gb, event.rank, event.warning) == (61.2, 58.9, 3, None)
    assert event.option == "zero2, batch 2"


@pytest.mark.parametrize(("share", "is_warned"), [(NEARLY_FULL - 0.01, False), (NEARLY_FULL, False), (0.96, True)])
def test_a_gpu_that_is_nearly_full_is_a_warning_with_what_to_type(share: float, is_warned: bool) -> None:
    event = compare_memory(plan(), peaks_gb=[share * FULL_GB], gpu_gb=FULL_GB, resume="janus-cluster resume janusvln-1")
    assert (event.warning is not None) == is_warned
    if is_warned:
        typed = shlex.split((event.warning or "").partition("should it run out: ")[2])
        # Only what the smaller option changes.
        assert typed == ["janus-cluster", "resume", "janusvln-1", "--set", "training.per_device_batch_size=1"]


def test_after_the_last_option_only_another_sample_helps() -> None:
    event = compare_memory(plan(taken=1), peaks_gb=[FULL_GB], gpu_gb=FULL_GB, resume="janus-cluster resume r")
    assert "data.history" in (event.warning or "")
    assert "resume" not in (event.warning or "")
