"""Where VGGT's weights are, found the same way for `config check`, the gate, training and `eval`.

In a file or folder of VGGT's own, inside a JanusVLN checkpoint (`vggt.aggregator.*`), or in vggt.safetensors beside it.
What a wrapper put before the names (`module.`, `model.`, a dictionary's keys) is found from the names themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from janus_cluster.errors import UsageError
from janus_cluster.job.schema import Model
from janus_cluster.modelspec.safetensors_header import (
    TORCH_SUFFIXES,
    CheckpointProblem,
    StoredTensor,
    check_against_index,
    find_weight_files,
    read_header,
    render_names,
)
from janus_cluster.modelspec.torch_header import read_torch_header
from janus_cluster.modelspec.weight_names import VGGT_PREFIX

VGGT_FILE = "vggt.safetensors"
VGGT_IN_JANUS_PREFIX = "vggt."
_OF_VGGT = re.compile(
    r"^(?P<prefix>(?:.*\.)?)aggregator\.(?:camera_token|register_token|(?:patch_embed|frame_blocks|global_blocks)\.)"
)


@dataclass(frozen=True, kw_only=True)
class VggtSource:
    """VGGT's weights on disk. `tensors` have VGGT-1B's names; on disk each has `prefix` before it.

    `key` is the option or key of the job that led to `path`.
    """

    path: Path
    key: str
    prefix: str
    tensors: Mapping[str, StoredTensor]


def read_tensor_index(path: Path, *, any_name: bool = False) -> dict[str, StoredTensor]:
    """Every tensor's name, file and shape, from headers alone. `any_name`: a folder's only file of weights is taken.

    Raises: CheckpointProblem if there is no such file, or it is broken.
    """
    found: dict[str, StoredTensor] = {}
    for file in find_weight_files(path, any_name=any_name):
        shapes = read_torch_header(file) if file.suffix in TORCH_SUFFIXES else read_header(file)
        found |= {name: StoredTensor(file=file, shape=shape) for name, shape in shapes.items()}
    check_against_index(path, found)
    return found


def find_vggt(path: Path, *, key: str) -> VggtSource:
    """VGGT's weights in `path`: a file, a folder of VGGT's own, a JanusVLN checkpoint, or an export.

    Raises: UsageError naming `key`, and what is there instead.
    """
    try:
        index = read_tensor_index(path, any_name=True)
        source = _in_checkpoint(path, index, key=key)
        if source is None:
            beside = f" and no {VGGT_FILE} beside it" if path.is_dir() else ""
            raise CheckpointProblem(
                f"{path}: holds no aggregator.* of VGGT's{beside}; its {len(index)} tensors are: "
                f"{render_names(list(index)) or 'none'}"
            )
    except CheckpointProblem as error:
        raise UsageError(f"{key}: {error}", hint="VGGT-1B: facebook/VGGT-1B") from error
    return source


def find_vggt_of(model: Model, index: Mapping[str, StoredTensor]) -> VggtSource | None:
    """VGGT's weights for a job: model.vggt_path, else those in model.path, whose tensors are `index`.

    None for a preset without weights. Raises: UsageError if they are nowhere, or cannot be read.
    """
    if model.vggt_path is not None:
        return find_vggt(Path(model.vggt_path), key="model.vggt_path")
    if model.path is None:
        return None
    folder = Path(model.path)
    try:
        source = _in_checkpoint(folder, index, key="model.path")
    except CheckpointProblem as error:
        raise UsageError(f"model.path: {error}") from error
    if source is None:
        raise UsageError(
            f"model.vggt_path is not set, and {folder} holds neither vggt.aggregator.* nor {VGGT_FILE}",
            hint="--set model.vggt_path=/path/to/VGGT-1B",
        )
    return source


def _in_checkpoint(path: Path, index: Mapping[str, StoredTensor], *, key: str) -> VggtSource | None:
    """VGGT among the tensors of `path`, else in the file beside them. Raises: CheckpointProblem on more than one."""
    prefixes = {match["prefix"] for name in index if (match := _OF_VGGT.match(name))}
    if len(prefixes) > 1:
        shown = ", ".join(f"{prefix}{VGGT_PREFIX}*" for prefix in sorted(prefixes))
        raise CheckpointProblem(f"{path}: holds more than one network of VGGT's ({shown}): save the one that is meant")
    if prefixes:
        prefix = prefixes.pop()
        tensors = {name.removeprefix(prefix): t for name, t in index.items() if name.startswith(prefix + VGGT_PREFIX)}
        if prefix != VGGT_IN_JANUS_PREFIX:
            # Its other heads are ignored, and counted.
            tensors = {name.removeprefix(prefix): t for name, t in index.items() if name.startswith(prefix)}
        return VggtSource(path=path, key=key, prefix=prefix, tensors=tensors)
    beside = path / VGGT_FILE
    if not beside.is_file():
        return None
    return _in_checkpoint(beside, read_tensor_index(beside), key=key)
