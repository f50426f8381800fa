"""The networks a job can name, as transformers configurations; their numbers are in modelspec/networks.py."""

from __future__ import annotations

from dataclasses import dataclass

from janus_cluster.janusvln.model.janus import JanusConfig
from janus_cluster.job.schema import Model
from janus_cluster.modelspec.networks import PRESETS

# Vocabulary rows are rounded up, so that a tokenizer of any size gives matrices that divide well over ranks.
VOCABULARY_MULTIPLE = 8


@dataclass(frozen=True, kw_only=True)
class TokenizerIds:
    """What the network needs of the tokenizer."""

    vocab_size: int
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    pad_token_id: int
    eos_token_id: int


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
