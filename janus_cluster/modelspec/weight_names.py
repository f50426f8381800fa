"""Name and shape of every weight of a network, worked out from its configuration's numbers. No torch.

Names of Qwen2.5-VL are those inside transformers 5 (`model.language_model.*`, `model.visual.*`); `name_on_disk` gives
the hub's. VGGT's are VGGT-1B's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from janus_cluster.modelspec.networks import VggtConfig

Shapes = dict[str, tuple[int, ...]]

VGGT_PREFIX = "aggregator."
ACTION_HEAD_PREFIX = "action_head."
OWN_PREFIXES = ("merger.", ACTION_HEAD_PREFIX)
HEAD = "lm_head.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"
# transformers' defaults of Qwen2_5_VLVisionConfig; published files leave some of them out.
VISION_DEFAULTS = {
    "depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "in_channels": 3, "patch_size": 14,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 3584,
}  # fmt: skip
# The parts that training.tune names.
PARTS = ("llm", "projector", "vision", "vggt_merger", "action_head")
# In this order: the first prefix that fits decides.
_PART_PREFIXES = (
    ("model.visual.merger.", "projector"),
    ("model.visual.", "vision"),
    ("merger.", "vggt_merger"),
    (ACTION_HEAD_PREFIX, "action_head"),
    ("", "llm"),
)
ACTION_HEAD_DIM = 512
NUM_ACTIONS = 4
VGGT_MERGER_DIM = 4096
_LAST_BLOCKS = re.compile(r"^aggregator\.(?:frame_blocks|global_blocks)\.(\d+)\.")


def part_of(name: str) -> str:
    """The part of training.tune that a weight belongs to, by its name in the network."""
    return next(part for prefix, part in _PART_PREFIXES if name.startswith(prefix))


def name_in_model(name: str) -> str:
    """A name of the hub's layout as transformers 5 calls it; names that already are stay as they are."""
    name = re.sub(r"^visual\.", "model.visual.", name)
    return re.sub(r"^model\.(?!language_model\.|visual\.)", "model.language_model.", name)


def name_on_disk(name: str) -> str:
    """The hub's name of a weight."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def declares_tied(config: Mapping[str, Any]) -> bool:
    """Whether a config.json calls the language model's head its embedding.

    As transformers 5 reads it: files saved before it may have the flag in text_config alone.
    """
    return bool(config.get("tie_word_embeddings") or (config.get("text_config") or {}).get("tie_word_embeddings"))


def janus_shapes(config: Mapping[str, Any]) -> Shapes:
    """Every weight of JanusVLN but VGGT's, for a config.json as a dictionary (flat as on the hub, or nested).

    With tied embeddings there is no lm_head.weight. Raises: KeyError naming a number that the configuration lacks.
    """
    text = {**config, **(config.get("text_config") or {})}
    vision = {**VISION_DEFAULTS, **(config.get("vision_config") or {})}
    hidden = text["hidden_size"]
    shapes = _language_shapes(text)
    shapes |= _vision_shapes(vision)
    if not declares_tied(config):
        shapes[HEAD] = (text["vocab_size"], hidden)
    feature_dim = VggtConfig.from_dict(config.get("vggt_config") or {}).feature_dim
    merger_dim = config.get("vggt_merger_hidden_dim", VGGT_MERGER_DIM)
    head_dim = config.get("action_head_hidden_dim", ACTION_HEAD_DIM)
    shapes["merger.ln_q.weight"] = (feature_dim,)
    shapes |= _linear("merger.mlp.0", 4 * feature_dim, merger_dim) | _linear("merger.mlp.2", merger_dim, hidden)
    shapes |= _linear("action_head.0", hidden, head_dim) | _norm("action_head.1", head_dim)
    shapes |= _linear("action_head.3", head_dim, config.get("num_actions", NUM_ACTIONS))
    return shapes


def vggt_shapes(config: VggtConfig) -> Shapes:
    """Every tensor that the aggregator needs: all of VGGT-1B's `aggregator.*` but the last frame and global block."""
    c = config.embed_dim
    shapes: Shapes = {
        "camera_token": (1, 2, 1, c),
        "register_token": (1, 2, config.num_register_tokens, c),
        "patch_embed.cls_token": (1, 1, c),
        "patch_embed.pos_embed": (1, (config.dino_image_size // config.patch_size) ** 2 + 1, c),
        "patch_embed.register_tokens": (1, config.num_register_tokens, c),
        "patch_embed.mask_token": (1, c),
        "patch_embed.patch_embed.proj.weight": (c, 3, config.patch_size, config.patch_size),
        "patch_embed.patch_embed.proj.bias": (c,),
    }
    shapes |= _norm("patch_embed.norm", c)
    for i in range(config.dino_depth):
        shapes |= _vit_block(f"patch_embed.blocks.{i}", c, config.mlp_ratio)
    for i in range(config.depth - 1):
        for kind in ("frame_blocks", "global_blocks"):
            shapes |= _vit_block(f"{kind}.{i}", c, config.mlp_ratio)
            shapes |= _norm(f"{kind}.{i}.attn.q_norm", c // config.num_heads)
            shapes |= _norm(f"{kind}.{i}.attn.k_norm", c // config.num_heads)
    return {VGGT_PREFIX + name: shape for name, shape in shapes.items()}


def is_unneeded_block(name: str, config: VggtConfig) -> bool:
    """True for a tensor of the last frame or global block, which the memory does not use."""
    match = _LAST_BLOCKS.match(name)
    return match is not None and int(match.group(1)) == config.depth - 1


def _language_shapes(text: Mapping[str, Any]) -> Shapes:
    hidden, wide = text["hidden_size"], text["intermediate_size"]
    kv = hidden // text["num_attention_heads"] * text["num_key_value_heads"]
    root = "model.language_model"
    shapes: Shapes = {f"{root}.embed_tokens.weight": (text["vocab_size"], hidden), f"{root}.norm.weight": (hidden,)}
    for i in range(text["num_hidden_layers"]):
        layer = f"{root}.layers.{i}"
        shapes |= _linear(f"{layer}.self_attn.q_proj", hidden, hidden)
        shapes |= _linear(f"{layer}.self_attn.k_proj", hidden, kv) | _linear(f"{layer}.self_attn.v_proj", hidden, kv)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{layer}.mlp.gate_proj.weight"] = shapes[f"{layer}.mlp.up_proj.weight"] = (wide, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, wide)
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    return shapes


def _vision_shapes(vision: Mapping[str, Any]) -> Shapes:
    dim, wide, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    root, merged = "model.visual", dim * vision["spatial_merge_size"] ** 2
    channels = vision.get("in_chans", vision["in_channels"])
    shapes: Shapes = {
        f"{root}.patch_embed.proj.weight": (dim, channels, vision["temporal_patch_size"], patch, patch),
        f"{root}.merger.ln_q.weight": (dim,),
    }
    for i in range(vision["depth"]):
        block = f"{root}.blocks.{i}"
        shapes[f"{block}.norm1.weight"] = shapes[f"{block}.norm2.weight"] = (dim,)
        shapes |= _linear(f"{block}.attn.qkv", dim, 3 * dim) | _linear(f"{block}.attn.proj", dim, dim)
        shapes |= _linear(f"{block}.mlp.gate_proj", dim, wide) | _linear(f"{block}.mlp.up_proj", dim, wide)
        shapes |= _linear(f"{block}.mlp.down_proj", wide, dim)
    shapes |= _linear(f"{root}.merger.mlp.0", merged, merged)
    return shapes | _linear(f"{root}.merger.mlp.2", merged, vision["out_hidden_size"])


def _vit_block(block: str, dim: int, mlp_ratio: int) -> Shapes:
    shapes: Shapes = {f"{block}.ls1.gamma": (dim,), f"{block}.ls2.gamma": (dim,)}
    shapes |= _norm(f"{block}.norm1", dim) | _norm(f"{block}.norm2", dim)
    shapes |= _linear(f"{block}.attn.qkv", dim, 3 * dim) | _linear(f"{block}.attn.proj", dim, dim)
    return (
        shapes | _linear(f"{block}.mlp.fc1", dim, mlp_ratio * dim) | _linear(f"{block}.mlp.fc2", mlp_ratio * dim, dim)
    )


def _linear(name: str, features_in: int, features_out: int) -> Shapes:
    return {f"{name}.weight": (features_out, features_in), f"{name}.bias": (features_out,)}


def _norm(name: str, dim: int) -> Shapes:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}
