"""The model's and VGGT's files as training will open them: configuration, every shard, tokenizer. Headers only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from janus_cluster.errors import UsageError
from janus_cluster.job.schema import Model
from janus_cluster.modelspec.check_weights import check_weights, judge_vggt_weights, load_config_values
from janus_cluster.modelspec.networks import PRESETS, VggtConfig
from janus_cluster.modelspec.safetensors_header import IS_LFS_POINTER, is_lfs_pointer
from janus_cluster.modelspec.vggt_source import find_vggt

# One of each line; without a tokenizer no sample can be encoded.
_TOKENIZER = (("tokenizer.json", "vocab.json"), ("tokenizer.json", "merges.txt"), ("tokenizer_config.json",))
_PROCESSOR = (("preprocessor_config.json", "processor_config.json"),)


def scan_model(model: Model) -> dict[str, Any]:
    """Facts: a line on the headers, `problems` (would stop training) and `doubts` (would not)."""
    folder = Path(str(model.path))
    problems = [f"{' or '.join(names)} is missing" for names in _TOKENIZER if not _any_of(folder, names)]
    named = dict.fromkeys(folder / name for names in _TOKENIZER for name in names)
    problems += [f"{path.name}: {IS_LFS_POINTER}" for path in named if path.is_file() and is_lfs_pointer(path)]
    doubts = [f"{' or '.join(names)} is missing" for names in _PROCESSOR if not _any_of(folder, names)]
    try:
        lines = check_weights(model)
    except UsageError as e:
        if "model.vggt_path" not in e.message.split(":")[0]:
            problems.append(_flat(e.message))
        lines = []
    return {"told": lines[0] if lines else "", "problems": problems, "doubts": doubts}


def scan_vggt(model: Model) -> dict[str, Any]:
    """The same facts of VGGT's own file."""
    try:
        summary = judge_vggt_weights(find_vggt(Path(str(model.vggt_path)), key="model.vggt_path"), _vggt_config(model))
    except UsageError as e:
        return {"told": "", "problems": [_flat(e.message)], "doubts": []}
    return {"told": summary, "problems": [], "doubts": []}


def _vggt_config(model: Model) -> VggtConfig:
    """The checkpoint's value, else the preset's."""
    values = load_config_values(Path(model.path)) if model.path else {}
    return VggtConfig.from_dict(values.get("vggt_config") or PRESETS[model.preset].vggt.to_dict())


def _any_of(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).is_file() for name in names)


def _flat(text: str) -> str:
    return " ".join(text.split())[:600]
