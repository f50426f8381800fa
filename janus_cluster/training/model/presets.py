"""The networks a job can name, as configurations. `tiny` is made on the spot; 3b and 7b are Qwen's published sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from janus_cluster.config.schema import Model
from janus_cluster.training.model.janus import JanusConfig
from janus_cluster.training.model.vggt import VggtConfig

# Vocabulary rows are rounded up, so that a tokenizer of any size gives matrices that divide well over ranks.
VOCABULARY_MULTIPLE = 8


@dataclass(frozen=True, kw_only=True)
class TokenizerIds:
    """What the network must know of the tokenizer."""

    vocab_size: int
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    pad_token_id: int
    eos_token_id: int


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One network's dimensions: Qwen's two configurations, VGGT's, and the merger between them."""

    text: dict[str, Any]
    vision: dict[str, Any]
    vggt: VggtConfig
    vggt_merger_hidden_dim: int
    tie_word_embeddings: bool


# Source of the dimensions: config.json of Qwen/Qwen2.5-VL-3B-Instruct and -7B-Instruct.
_QWEN_TEXT = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128000,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
_QWEN_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
}

PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        text={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [2, 3, 3]},
        },
        vision={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        vggt=VggtConfig(embed_dim=32, depth=3, num_heads=2, dino_depth=2, dino_num_heads=2, dino_image_size=70),
        vggt_merger_hidden_dim=64,
        tie_word_embeddings=False,
    ),
    "qwen2.5-vl-3b": Preset(
        text=_QWEN_TEXT
        | {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
        },
        vision=_QWEN_VISION | {"out_hidden_size": 2048},
        vggt=VggtConfig(),
        vggt_merger_hidden_dim=4096,
        tie_word_embeddings=True,
    ),
    "qwen2.5-vl-7b": Preset(
        text=_QWEN_TEXT
        | {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        vision=_QWEN_VISION | {"out_hidden_size": 3584},
        vggt=VggtConfig(),
        vggt_merger_hidden_dim=4096,
        tie_word_embeddings=False,
    ),
}


def build_config(model: Model, ids: TokenizerIds | None = None) -> JanusConfig:
    """The preset's configuration with the job's λ and reference frame; the tokenizer's ids where they are given."""
    preset = PRESETS[model.preset]
    text, top = dict(preset.text), {}
    if ids is not None:
        text |= {"pad_token_id": ids.pad_token_id, "eos_token_id": ids.eos_token_id}
        text.setdefault("vocab_size", -(-ids.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE)
        text.setdefault("bos_token_id", None)
        top = {
            "image_token_id": ids.image_token_id,
            "video_token_id": ids.video_token_id,
            "vision_start_token_id": ids.vision_start_token_id,
            "vision_end_token_id": ids.vision_end_token_id,
        }
    return JanusConfig(
        text_config=text,
        vision_config=dict(preset.vision),
        tie_word_embeddings=preset.tie_word_embeddings,
        vggt_config=preset.vggt.to_dict(),
        vggt_merger_hidden_dim=preset.vggt_merger_hidden_dim,
        lam=model.lam,
        reference_frame=model.reference_frame,
        **top,
    )
