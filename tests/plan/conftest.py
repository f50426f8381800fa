"""What most plan tests start from: the published 7B network and the longest sample of the shipped jobs."""

from __future__ import annotations

import pytest

from janus_cluster.job.schema import Data
from janus_cluster.modelspec.sizes import Sizes, preset_sizes
from janus_cluster.plan.sample import Sample, plan_sample


@pytest.fixture(scope="session")
def sizes() -> Sizes:
    return preset_sizes("qwen2.5-vl-7b")


@pytest.fixture(scope="session")
def sample() -> Sample:
    return plan_sample(Data())
