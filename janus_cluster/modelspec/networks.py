"""The networks a job can name, as numbers: what the weights on disk must look like follows from them. No torch.

Source: config.json of Qwen/Qwen2.5-VL-3B-Instruct and -7B-Instruct; VGGT (arXiv 2503.11651).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class VggtConfig:
    """The aggregator's dimensions; the defaults are VGGT-1B's."""

    embed_dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_ratio: int = 4
    patch_size: int = 14
    num_register_tokens: int = 4
    rope_base: float = 100.0
    dino_depth: int = 24
    dino_num_heads: int = 16
    dino_image_size: int = 518

    @property
    def num_special_tokens(self) -> int:
        return 1 + self.num_register_tokens

    @property
    def feature_dim(self) -> int:
        return 2 * self.embed_dim

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VggtConfig:
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One network's dimensions: Qwen's two configurations, VGGT's, and the merger between them."""

    text: dict[str, Any]
    vision: dict[str, Any]
    vggt: VggtConfig
    vggt_merger_hidden_dim: int
    tie_word_embeddings: bool


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
