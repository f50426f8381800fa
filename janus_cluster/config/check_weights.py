"""The weights of a job, judged by what their headers say: what will be taken, drawn anew and ignored. No torch, no GPU.

`janus-cluster config check` runs this on the login node; loading for training goes through the same judgement.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from janus_cluster.config.networks import PRESETS, VggtConfig
from janus_cluster.config.safetensors_header import (
    TORCH_SUFFIXES,
    CheckpointProblem,
    StoredTensor,
    find_problems,
    find_weight_files,
    read_safetensors_index,
    read_torch_directory,
)
from janus_cluster.config.schema import Model
from janus_cluster.config.tied_head import resolve_head
from janus_cluster.config.weight_names import (
    OWN_PREFIXES,
    VGGT_PREFIX,
    Shapes,
    is_unneeded_block,
    janus_shapes,
    name_in_model,
    name_on_disk,
    says_tied,
    vggt_shapes,
)
from janus_cluster.errors import UsageError

MODEL_TYPE = "qwen2_5_vl"
VGGT_FILE = "vggt.safetensors"
VGGT_IN_JANUS_PREFIX = "vggt."
FAMILY_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
ADAPTER_FILE = "adapter_config.json"
FAMILY_HINT = "Qwen2.5-VL-3B/7B-Instruct, or a JanusVLN checkpoint made of one"


@dataclass(frozen=True, kw_only=True)
class WeightReport:
    """What becomes of a checkpoint's tensors."""

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
        index = _index_of(folder, key="model.path")
        report = judge_model_weights(index, expected_shapes(values, folder), where=folder)
        lines = [f"model: {folder}: {report}", *note_on_head(folder)]
        # A file that names no vggt_config was published with VGGT-1B; the preset says the same, or tiny's numbers.
        config = VggtConfig.from_dict(values.get("vggt_config") or PRESETS[model.preset].vggt.to_dict())
    vggt = _check_vggt(model, index, config)
    return lines + ([vggt] if vggt else [])


def load_config_values(folder: Path) -> dict[str, Any]:
    """folder/config.json of a Qwen2.5-VL, untied where the weights beside it are.

    Raises: UsageError if it cannot be read, belongs to another family, or lies beside an adapter.
    """
    return resolve_head(_read_config(folder), folder)


def note_on_head(folder: Path) -> list[str]:
    """A line where the folder's weights are untied although its config.json says otherwise; else none."""
    written = _read_config(folder)
    if says_tied(written) == says_tied(resolve_head(written, folder)):
        return []
    return [
        f"model: {folder}: config.json says tie_word_embeddings: true, but lm_head.weight is not the embedding: the "
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
    """What becomes of the tensors in `index` (any layout) for a network of `expected` (names of transformers 5).

    Raises: UsageError if they do not fill Qwen2.5-VL, or fill a merger or an action head by halves.
    """
    stored = {name_in_model(name): tensor for name, tensor in index.items()}
    new = tuple(p for p in OWN_PREFIXES if not any(name.startswith(p) for name in stored))
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


def judge_vggt_weights(
    index: Mapping[str, StoredTensor], config: VggtConfig, *, where: Path, key: str, disk_prefix: str = ""
) -> str:
    """A line on what becomes of VGGT's tensors. Raises: UsageError on missing or misshapen `aggregator.*`."""
    expected = vggt_shapes(config)
    problems = find_problems(index, expected, where=where, name_on_disk=lambda name: disk_prefix + name)
    if problems:
        raise UsageError.of_many([f"{key}: {p}" for p in problems], hint="VGGT-1B: facebook/VGGT-1B, aggregator.*")
    spare = sum(is_unneeded_block(name, config) for name in index)
    ignored = len(index) - len(expected)
    return f"vggt: {where}: {len(expected)} tensors taken, {ignored} ignored ({spare} of the last blocks)"


def vggt_inside(index: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The aggregator's tensors that a JanusVLN checkpoint carries (`vggt.aggregator.*`), under VGGT-1B's names."""
    return {
        name.removeprefix(VGGT_IN_JANUS_PREFIX): tensor
        for name, tensor in index.items()
        if name.startswith(VGGT_IN_JANUS_PREFIX + VGGT_PREFIX)
    }


def holds_vggt(folder: Path) -> bool:
    """Whether a model's folder holds VGGT's weights too, in its own files or in one beside them."""
    if (folder / VGGT_FILE).is_file():
        return True
    try:
        return bool(vggt_inside(read_safetensors_index(folder)))
    except CheckpointProblem:
        return False


def no_vggt(folder: Path) -> UsageError:
    """The error for a job that says nowhere where VGGT lies."""
    return UsageError(
        f"model.vggt_path is not set, and {folder} holds neither vggt.aggregator.* nor {VGGT_FILE}",
        hint="--set model.vggt_path=/path/to/VGGT-1B",
    )


def _check_vggt(model: Model, index: Mapping[str, StoredTensor], config: VggtConfig) -> str | None:
    """VGGT from model.vggt_path, else from the checkpoint itself, else from the file beside it; as loading does."""
    if model.vggt_path is not None:
        return _check_vggt_file(Path(model.vggt_path), config, key="model.vggt_path")
    if model.path is None:
        return None
    folder = Path(model.path)
    inside = vggt_inside(index)
    if inside:
        return judge_vggt_weights(inside, config, where=folder, key="model.path", disk_prefix=VGGT_IN_JANUS_PREFIX)
    if (folder / VGGT_FILE).is_file():
        return _check_vggt_file(folder / VGGT_FILE, config, key="model.path")
    raise no_vggt(folder)


def _check_vggt_file(path: Path, config: VggtConfig, *, key: str) -> str:
    try:
        files = find_weight_files(path)
        if files[0].suffix not in TORCH_SUFFIXES:
            return judge_vggt_weights(read_safetensors_index(path), config, where=path, key=key)
        count, size = read_torch_directory(files[0])
    except CheckpointProblem as error:
        raise UsageError(f"{key}: {error}") from error
    needed = 2 * sum(_product(shape) for shape in vggt_shapes(config).values())
    if size < needed:
        raise UsageError(
            f"{key}: {files[0]}: {size:,} bytes of weights, the aggregator has {needed:,} in 16 bits",
            hint="is the download complete, and VGGT-1B?",
        )
    return (
        f"vggt: {files[0]}: {count} storages, {size / 1e9:.2f} GB; its names stand in a pickle, which is not opened "
        "here: they are checked when training starts"
    )


def _index_of(path: Path, *, key: str) -> dict[str, StoredTensor]:
    try:
        return read_safetensors_index(path)
    except CheckpointProblem as error:
        raise UsageError(f"{key}: {error}") from error


def expected_shapes(values: Mapping[str, Any], folder: Path) -> Shapes:
    """Every weight but VGGT's that folder/config.json wants. Raises: UsageError naming a number that it lacks."""
    try:
        return janus_shapes(values)
    except (KeyError, TypeError) as error:
        raise UsageError(f"model.path: {folder}/config.json: {error} is missing or no number") from error


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total
