"""Folders of weights of the real sizes: real headers and configurations, with holes for the tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from janus_cluster.modelspec.networks import PRESETS, VggtConfig
from janus_cluster.modelspec.weight_names import OWN_PREFIXES, janus_shapes, name_on_disk, vggt_shapes

Shapes = dict[str, tuple[int, ...]]
SEVEN_B = "qwen2.5-vl-7b"


def write_safetensors(file: Path, shapes: Shapes) -> Path:
    """A bf16 file of the right size with a real header; its data are holes, so that 16 GB take no room."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        size = 2
        for n in shape:
            size *= n
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)
    return file


def config_values(preset: str = SEVEN_B) -> dict[str, Any]:
    """config.json as on the hub: the language model's numbers at the top."""
    p = PRESETS[preset]
    return {
        "model_type": "qwen2_5_vl", "tie_word_embeddings": p.tie_word_embeddings, "vocab_size": 600,
        **p.text, "vision_config": {**p.vision},
    }  # fmt: skip


def qwen_shapes(values: dict[str, Any]) -> Shapes:
    return {
        name_on_disk(name): shape for name, shape in janus_shapes(values).items() if not name.startswith(OWN_PREFIXES)
    }


def write_qwen(
    folder: Path, shapes: Shapes | None = None, *, preset: str = SEVEN_B, shards: int = 4, **changed: Any
) -> Path:
    """A Qwen2.5-VL folder as on the hub, sharded, with an index."""
    values = config_values(preset) | changed
    names = list((shapes or qwen_shapes(values)).items())
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        write_safetensors(folder / file, dict(names[i::shards]))
        weight_map |= {name: file for name, _ in names[i::shards]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_vggt(folder: Path) -> Path:
    """A VGGT-1B folder with more blocks and heads than are used."""
    folder.mkdir()
    spare = vggt_shapes(VggtConfig(depth=25)) | {"camera_head.token": (1,), "depth_head.norm.weight": (2048,)}
    write_safetensors(folder / "model.safetensors", spare)
    return folder
