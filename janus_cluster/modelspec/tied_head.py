"""A config.json that ties the language model's head to its embedding, beside a head of other values.

Such a folder was written after the head was trained alone: an adapter on it was merged, or an untied network was saved
with the flag of the network it began as. The head in the file is taken and the network is untied, for every reader of
ours and under every ZeRO stage. (transformers 5 does the same, except under ZeRO-3, where it ties them.)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from janus_cluster.modelspec.safetensors_header import CheckpointProblem, hold_same_data, read_safetensors_index
from janus_cluster.modelspec.weight_names import EMBEDDING, HEAD, declares_tied, name_in_model


def resolve_head(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """`values` (folder/config.json), untied where the folder's weights hold a head that is not the embedding."""
    resolved = dict(values)
    if declares_tied(values) and _has_own_head(folder):
        resolved["tie_word_embeddings"] = False
        if isinstance(values.get("text_config"), Mapping):
            resolved["text_config"] = {**values["text_config"], "tie_word_embeddings": False}
    return resolved


def _has_own_head(folder: Path) -> bool:
    """False also where the weights are absent or unreadable: loading them raises the error."""
    try:
        index = read_safetensors_index(folder)
        names = {name_in_model(name): name for name in index}
        if HEAD not in names or EMBEDDING not in names:
            return False
        return not hold_same_data(index, names[HEAD], names[EMBEDDING])
    except CheckpointProblem:
        return False
