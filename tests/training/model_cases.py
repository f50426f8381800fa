"""The reference numbers of fixtures/, loaded; see fixtures/README.md for where they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from janus_cluster.config.schema import Model, Training, Tune
from janus_cluster.training.model.build import build_model
from janus_cluster.training.model.janus import JanusModel
from janus_cluster.training.model.presets import TokenizerIds

FIXTURES = Path(__file__).parent / "fixtures"
CHECKPOINT = FIXTURES / "janus_model_tiny"
CASES: dict[str, dict[str, Any]] = json.loads((FIXTURES / "janus_cases.json").read_text(encoding="utf-8"))
EVERYTHING = Training(tune=Tune(vision=True))
IDS = TokenizerIds(
    vocab_size=600,
    image_token_id=595,
    video_token_id=596,
    vision_start_token_id=593,
    vision_end_token_id=594,
    pad_token_id=590,
    eos_token_id=592,
)


def load_case(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The batch as forward() takes it, and every tensor of the case."""
    tensors = load_file(FIXTURES / f"janus_case_{name}.safetensors")
    batch = {
        "input_ids": tensors["in.input_ids"],
        "attention_mask": tensors["in.attention_mask"],
        "mm_token_type_ids": (tensors["in.input_ids"] == IDS.image_token_id).long(),
        "labels": tensors["in.labels"],
        "loss_weights": tensors["in.loss_weights"],
        "segment_ids": tensors["in.segment_ids"],
        "actions": tensors["in.action_label"],
        "frames": [tensors[f"in.frames.{b}"] for b in range(len(tensors["in.input_ids"]))],
        "image_grid_thw": tensors["in.image_grid_thw"],
    }
    return batch, tensors


def build_reference_model(**model_keys: Any) -> JanusModel:
    """The fixture's checkpoint through the whole of build_model, every part trainable."""
    return build_model(
        Model(preset="tiny", path=str(CHECKPOINT), **model_keys),
        EVERYTHING,
        tokenizer_ids=IDS,
        device="cpu",
        dtype=torch.float32,
        seed=0,
    )


def worst(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; the shapes must agree."""
    assert actual.shape == expected.shape, f"{list(actual.shape)} against {list(expected.shape)}"
    return float((actual.double() - expected.double()).abs().max())
