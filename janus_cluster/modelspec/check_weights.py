"""The weights of a job, judged by their headers: what will be loaded, drawn at random and ignored. No torch, no GPU.

`janus-cluster config check` runs this on the login node; loading for training goes through the same judgement.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from janus_cluster.errors import UsageError
from janus_cluster.job.schema import Model, Training
from janus_cluster.modelspec.networks import PRESETS, VggtConfig
from janus_cluster.modelspec.safetensors_header import (
    CheckpointProblem,
    StoredTensor,
    find_problems,
    read_safetensors_index,
)
from janus_cluster.modelspec.tied_head import resolve_head
from janus_cluster.modelspec.vggt_source import VGGT_IN_JANUS_PREFIX, VggtSource, find_vggt_of
from janus_cluster.modelspec.weight_names import (
    ACTION_HEAD_PREFIX,
    OWN_PREFIXES,
    Shapes,
    declares_tied,
    is_unneeded_block,
    janus_shapes,
    name_in_model,
    name_on_disk,
    vggt_shapes,
)

MODEL_TYPE = "qwen2_5_vl"
FAMILY_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
ADAPTER_FILE = "adapter_config.json"
FAMILY_HINT = "Qwen2.5-VL-3B/7B-Instruct, or a JanusVLN checkpoint made of one"


@dataclass(frozen=True, kw_only=True)
class WeightReport:
    """Which of a checkpoint's tensors are taken, drawn anew or left out."""

    taken: int
    new: int
    new_modules: tuple[str, ...]
    ignored: int
    ignored_groups: tuple[str, ...]

    def __str__(self) -> str:
        groups = f" ({', '.join(self.ignored_groups)})" if self.ignored_groups else ""
        return (
            f"{self.taken} tensors taken, {self.new} newly initialised ({', '.join(self.new_modules) or 'none'}), "
            f"{self.ignored} ignored{groups}"
        )


def check_weights(model: Model) -> list[str]:
    """One line a checkpoint: what will be taken, newly initialised and ignored. Only headers are read.

    Raises: UsageError naming file and key: another family or size, missing or misshapen weights, absent or cut files.
    """
    if model.path is None:
        if model.preset != "tiny":
            raise UsageError(f"model.path: preset {model.preset} needs weights", hint="--set model.path=/path/to/model")
        lines = ["model: preset tiny: random weights, the same for the same training.seed"]
        config, index = PRESETS["tiny"].vggt, {}
    else:
        folder = Path(model.path)
        values = load_config_values(folder)
        check_family(values, model, folder)
        index = read_model_index(folder)
        report = judge_model_weights(index, expected_shapes(values, folder), where=folder)
        lines = [f"model: {folder}: {report}", *note_on_head(folder)]
        # A file that names no vggt_config was published with VGGT-1B; the preset has the same sizes, or tiny's.
        config = VggtConfig.from_dict(values.get("vggt_config") or PRESETS[model.preset].vggt.to_dict())
    vggt = find_vggt_of(model, index)
    return lines + ([judge_vggt_weights(vggt, config)] if vggt else [])


def load_config_values(folder: Path) -> dict[str, Any]:
    """folder/config.json of a Qwen2.5-VL, untied where the weights beside it are.

    Raises: UsageError if it cannot be read, belongs to another family, or is beside an adapter.
    """
    return resolve_head(_read_config(folder), folder)


def note_on_head(folder: Path) -> list[str]:
    """A line where the folder's weights are untied against its config.json; else none."""
    written = _read_config(folder)
    if declares_tied(written) == declares_tied(resolve_head(written, folder)):
        return []
    return [
        f"model: {folder}: config.json has tie_word_embeddings: true, but lm_head.weight is not the embedding: the "
        "network is untied, with the file's own lm_head (to have it tied: a copy of the folder without lm_head.weight)"
    ]


def _read_config(folder: Path) -> dict[str, Any]:
    if (folder / ADAPTER_FILE).is_file():
        raise UsageError(
            f"model.path: {folder} holds an adapter ({ADAPTER_FILE}), which transformers would lay over the weights",
            hint="merge it into the weights first, or give a folder of weights alone",
        )
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"model.path: {folder} has no readable config.json: {error}") from error
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if model_type != MODEL_TYPE:
        raise UsageError(f"model.path: {path}: model_type is {model_type!r}, not {MODEL_TYPE!r}", hint=FAMILY_HINT)
    return dict(values)


def check_family(values: Mapping[str, Any], model: Model, folder: Path) -> None:
    """The configuration has the preset's size; any size is tiny. Raises: UsageError listing what differs."""
    if model.preset == "tiny":
        return
    text, wanted = {**values, **(values.get("text_config") or {})}, PRESETS[model.preset].text
    problems = [
        f"model.path: {folder}/config.json: {key} is {text.get(key)}, preset {model.preset} has {wanted[key]}"
        for key in FAMILY_KEYS
        if text.get(key) != wanted[key]
    ]
    if problems:
        raise UsageError.of_many(problems, hint="model.path and model.preset must belong together")


def judge_model_weights(index: Mapping[str, StoredTensor], expected: Shapes, *, where: Path) -> WeightReport:
    """Which of the tensors in `index` (any layout) a network of `expected` takes (names of transformers 5).

    Raises: UsageError if they do not fill Qwen2.5-VL, or fill a merger or an action head by halves.
    """
    stored = {name_in_model(name): tensor for name, tensor in index.items()}
    new = find_new_modules(index)
    needed = {name: shape for name, shape in expected.items() if not name.startswith(new or ("\0",))}
    problems = find_problems(stored, needed, where=where, name_on_disk=name_on_disk)
    if problems:
        raise UsageError.of_many(
            [f"model.path: {problem}" for problem in problems], hint="is the download complete, and the right size?"
        )
    ignored = [name for name in stored if name not in expected]
    return WeightReport(
        taken=len(needed),
        new=len(expected) - len(needed),
        new_modules=new,
        ignored=len(ignored),
        ignored_groups=tuple(sorted({name.split(".")[0] + ".*" for name in ignored})),
    )


def find_new_modules(index: Mapping[str, StoredTensor]) -> tuple[str, ...]:
    """The modules of OWN_PREFIXES that a checkpoint does not hold: loading draws them at random."""
    return tuple(p for p in OWN_PREFIXES if not any(name.startswith(p) for name in index))


def why_head_is_random(model: Model, training: Training) -> str | None:
    """Why the action head keeps the values it was drawn with; None where it is trained, or model.path holds it.

    Raises: UsageError where model.path cannot be read.
    """
    if training.tune.action_head and training.action_loss_weight > 0:
        return None
    if model.path is not None and ACTION_HEAD_PREFIX not in find_new_modules(read_model_index(Path(model.path))):
        return None
    cause = "training.action_loss_weight is 0" if training.tune.action_head else "training.tune.action_head is false"
    return f"drawn at random and not trained ({cause}, model.path holds no {ACTION_HEAD_PREFIX}*)"


def judge_vggt_weights(source: VggtSource, config: VggtConfig) -> str:
    """A line on which of VGGT's tensors are taken. Raises: UsageError on missing or misshapen `aggregator.*`."""
    expected, index = vggt_shapes(config), source.tensors
    problems = find_problems(index, expected, where=source.path, name_on_disk=lambda name: source.prefix + name)
    if problems:
        raise UsageError.of_many(
            [f"{source.key}: {p}" for p in problems], hint="VGGT-1B: facebook/VGGT-1B, aggregator.*"
        )
    spare = sum(is_unneeded_block(name, config) for name in index)
    unwrapped = f", named {source.prefix}* there" if source.prefix not in ("", VGGT_IN_JANUS_PREFIX) else ""
    return (
        f"vggt: {source.path}: {len(expected)} tensors taken, {len(index) - len(expected)} ignored "
        f"({spare} of the last blocks){unwrapped}"
    )


def read_model_index(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of model.path. Raises: UsageError."""
    try:
        return read_safetensors_index(folder)
    except CheckpointProblem as error:
        raise UsageError(f"model.path: {error}") from error


def expected_shapes(values: Mapping[str, Any], folder: Path) -> Shapes:
    """Every weight but VGGT's that folder/config.json wants. Raises: UsageError naming a number that it lacks."""
    try:
        return janus_shapes(values)
    except (KeyError, TypeError) as error:
        raise UsageError(f"model.path: {folder}/config.json: {error} is missing or no number") from error
