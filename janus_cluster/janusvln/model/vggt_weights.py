"""VGGT-1B's tensors <-> our aggregator. On disk the names are VGGT-1B's; only here are they translated.

The blocks carry VGGT's names already. `aggregator.patch_embed.*` is DINOv2-with-registers, where transformers splits
`qkv` in three and names things otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from janus_cluster.janusvln.model.vggt import Aggregator
from janus_cluster.modelspec.weight_names import VGGT_PREFIX as PREFIX
from janus_cluster.modelspec.weight_names import is_unneeded_block

DINO_PREFIX = "patch_embed."
QKV_PARTS = ("q_proj", "k_proj", "v_proj")

_DINO_RENAMES = (
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^mask_token$", "embeddings.mask_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^register_tokens$", "embeddings.register_tokens"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.o_proj."),
    (r"^blocks\.(\d+)\.ls([12])\.gamma$", r"encoder.layer.\1.layer_scale\2.lambda1"),
    (r"^blocks\.", "encoder.layer."),
)
_QKV = re.compile(r"^blocks\.(\d+)\.attn\.qkv\.(weight|bias)$")
_QKV_PART = re.compile(r"^encoder\.layer\.(\d+)\.attention\.(q_proj|k_proj|v_proj)\.(weight|bias)$")


def vggt_state_dict(aggregator: Aggregator) -> dict[str, Tensor]:
    """The aggregator's tensors under VGGT-1B's names (without the last two blocks, which are not there)."""
    out: dict[str, Tensor] = {}
    dino: dict[str, Tensor] = {}
    for name, tensor in aggregator.state_dict().items():
        if name.startswith(DINO_PREFIX):
            dino[name.removeprefix(DINO_PREFIX)] = tensor
        else:
            out[PREFIX + name] = tensor
    for name, tensor in _merged_qkv(dino).items():
        out[PREFIX + DINO_PREFIX + name] = tensor
    return out


def load_vggt_state(aggregator: Aggregator, tensors: Mapping[str, Tensor]) -> None:
    """The aggregator's parameters are `tensors` (VGGT-1B's names, the last blocks tolerated), on their present device.

    Raises: RuntimeError (torch's) on missing, unknown or misshapen tensors; check with `expected_shapes` first.
    """
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if is_unneeded_block(name, aggregator.config):
            continue
        bare = name.removeprefix(PREFIX)
        if bare.startswith(DINO_PREFIX):
            for dino_name, part in _split_qkv(bare.removeprefix(DINO_PREFIX), tensor):
                own[DINO_PREFIX + dino_name] = part
        else:
            own[bare] = tensor
    aggregator.load_state_dict(own, strict=True, assign=True)


def _split_qkv(name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
    match = _QKV.match(name)
    if match is None:
        return [(_to_transformers(name), tensor)]
    layer, kind = match.groups()
    parts = tensor.chunk(3)
    return [(f"encoder.layer.{layer}.attention.{part}.{kind}", t) for part, t in zip(QKV_PARTS, parts, strict=True)]


def _merged_qkv(dino: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, tensor in dino.items():
        match = _QKV_PART.match(name)
        if match is None:
            out[_to_vggt(name)] = tensor
            continue
        layer, part, kind = match.groups()
        if part == QKV_PARTS[0]:
            parts = [dino[f"encoder.layer.{layer}.attention.{p}.{kind}"] for p in QKV_PARTS]
            out[f"blocks.{layer}.attn.qkv.{kind}"] = torch.cat(parts)
    return out


def _to_transformers(name: str) -> str:
    for pattern, replacement in _DINO_RENAMES:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


_DINO_RENAMES_BACK = (
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.(\d+)\.attention\.o_proj\.", r"blocks.\1.attn.proj."),
    (r"^encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1$", r"blocks.\1.ls\2.gamma"),
    (r"^encoder\.layer\.", "blocks."),
)


def _to_vggt(name: str) -> str:
    for pattern, replacement in _DINO_RENAMES_BACK:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name
