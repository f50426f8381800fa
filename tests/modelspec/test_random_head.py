"""Whether the action head means anything, from the job and the names in model.path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from weight_files import SEVEN_B, config_values, write_qwen

from janus_cluster.job.schema import Model, Training
from janus_cluster.modelspec.check_weights import why_head_is_random
from janus_cluster.modelspec.weight_names import janus_shapes, name_on_disk


@pytest.mark.parametrize(
    ("training", "cause"),
    [
        ({"tune": {"action_head": False}}, "training.tune.action_head is false"),
        ({"action_loss_weight": 0}, "training.action_loss_weight is 0"),
        ({}, None),
    ],
)
def test_a_head_is_random_where_it_is_neither_trained_nor_loaded(
    tmp_path: Path, training: dict[str, Any], cause: str | None
) -> None:
    chosen = Training.model_validate(training)
    plain = why_head_is_random(Model(preset=SEVEN_B, path=str(write_qwen(tmp_path / "qwen"))), chosen)
    own = why_head_is_random(Model(preset="tiny"), chosen)
    assert (plain is None) == (own is None) == (cause is None)
    assert cause is None or (cause in str(plain) and cause in str(own))
    everything = {name_on_disk(name): shape for name, shape in janus_shapes(config_values()).items()}
    loaded = write_qwen(tmp_path / "janus", everything)
    assert why_head_is_random(Model(preset=SEVEN_B, path=str(loaded)), chosen) is None
