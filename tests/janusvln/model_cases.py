"""The reference numbers of the checkout (tests/vectors/README.md), as tests want them."""

from __future__ import annotations

import atexit
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from janus_cluster.janusvln.model.build import build_model
from janus_cluster.janusvln.model.janus import JanusModel
from janus_cluster.janusvln.verify.model import tokenizer_ids, write_checkpoint
from janus_cluster.job.resources import vectors_dir
from janus_cluster.job.schema import Model, Training, Tune

VECTORS = vectors_dir()
WEIGHTS = "janus_model_tiny_seed0"
AGGREGATOR = VECTORS / "vggt_aggregator_tiny_seed0.safetensors"
SIDECAR: dict[str, Any] = json.loads((VECTORS / f"{WEIGHTS}.json").read_text(encoding="utf-8"))
CASES: dict[str, dict[str, Any]] = {
    path.stem.removeprefix(f"{WEIGHTS}.case_"): json.loads(path.read_text(encoding="utf-8"))
    for path in sorted(VECTORS.glob(f"{WEIGHTS}.case_*.json"))
}
EVERYTHING = Training(tune=Tune(vision=True))
IDS = tokenizer_ids(SIDECAR["config"])

# The reference weights as a published checkpoint: config.json and a link, for as long as this process lives.
_FOLDER = tempfile.TemporaryDirectory(prefix="janus-checkpoint-")
atexit.register(_FOLDER.cleanup)
CHECKPOINT = Path(_FOLDER.name)
write_checkpoint(CHECKPOINT, SIDECAR, VECTORS / f"{WEIGHTS}.safetensors")


def load_case(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The batch as forward() takes it, and every tensor of the case."""
    tensors = load_file(VECTORS / f"{WEIGHTS}.case_{name}.safetensors")
    batch = {
        "input_ids": tensors["in.input_ids"],
        "attention_mask": tensors["in.attention_mask"],
        "mm_token_type_ids": (tensors["in.input_ids"] == IDS.image_token_id).long(),
        "labels": tensors["in.labels"],
        "loss_weights": tensors["in.loss_weights"],
        "segment_ids": tensors["in.segment_ids"],
        "actions": tensors["in.action_label"],
        "frames": [tensors[f"in.images_vggt.{b}"] for b in range(len(tensors["in.input_ids"]))],
        "image_grid_thw": tensors["in.image_grid_thw"],
    }
    return batch, tensors


def build_reference_model(**model_keys: Any) -> JanusModel:
    """The reference checkpoint through the whole of build_model, every part trainable."""
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
