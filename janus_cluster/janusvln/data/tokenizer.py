"""Tokenizers: a checkpoint's own, or a tiny one trained on the spot; and what an export folder needs beside weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, Qwen2Tokenizer, Qwen2VLImageProcessorPil

from janus_cluster.errors import UsageError
from janus_cluster.janusvln.data.prompt import SYSTEM
from janus_cluster.janusvln.model.presets import TokenizerIds
from janus_cluster.job.schema import Data

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
EOS = "<|im_end|>"
PAD = "<|endoftext|>"

# ChatML as render_prompt_parts writes it, one <|image_pad|> per image (a processor expands it).
CHAT_TEMPLATE = (
    "{%- if messages[0].role != 'system' -%}<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif -%}"
    "{%- for message in messages -%}"
    "<|im_start|>{{ message.role }}\n"
    "{%- if message.content is string -%}{{ '\n' ~ message.content }}"
    "{%- else -%}{{ '\n' }}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif part.type == 'text' -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}{{ '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """Ids of the tokens that are placeholders of images."""

    vision_start: int
    vision_end: int
    image_pad: int
    video_pad: int


def image_token_ids(tokenizer: Any) -> ImageTokens:
    """Ids of the image tokens in this tokenizer's vocabulary."""
    names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    return ImageTokens(*(int(tokenizer.convert_tokens_to_ids(name)) for name in names))


def tokenizer_ids(tokenizer: Any) -> TokenizerIds:
    """The token ids that the network needs."""
    image = image_token_ids(tokenizer)
    return TokenizerIds(
        vocab_size=len(tokenizer),
        image_token_id=image.image_pad,
        video_token_id=image.video_pad,
        vision_start_token_id=image.vision_start,
        vision_end_token_id=image.vision_end,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(EOS),
    )


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a checkpoint folder; nothing is fetched.

    Raises: UsageError if the folder holds none, or one without Qwen2.5-VL's image tokens.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(
            f"model.path: {folder} is not a folder", hint="give the folder that holds tokenizer_config.json"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"model.path: no tokenizer can be loaded from {folder}: {error}",
            hint="a Qwen2.5-VL folder holds tokenizer.json or vocab.json with merges.txt, and tokenizer_config.json",
        ) from error
    vocab = tokenizer.get_vocab()
    missing = [name for name in SPECIAL_TOKENS if name not in vocab]
    if missing:
        raise UsageError(f"model.path: the tokenizer in {folder} lacks {', '.join(missing)}")
    return _ready(tokenizer)


def build_tiny_tokenizer(texts: Iterable[str], *, vocab_size: int = 1024) -> Any:
    """A byte-level BPE of the texts with Qwen's pre-tokenizer and control tokens; the same texts give the same ids.

    `vocab_size` is an upper limit without the control tokens; few texts give fewer.
    """
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(sorted(set(texts)), trainer)
    vocab, merges = _vocabulary(bpe)
    extra = [token for token in SPECIAL_TOKENS if token not in (EOS, PAD)]
    return _ready(Qwen2Tokenizer(vocab=vocab, merges=merges, eos_token=EOS, pad_token=PAD, extra_special_tokens=extra))


def build_image_processor(data: Data) -> Any:
    """Qwen's image processor (PIL, no torchvision) with this job's pixel limits, for evaluation code to load."""
    return Qwen2VLImageProcessorPil(size={"shortest_edge": data.min_pixels, "longest_edge": data.max_pixels})


def write_processing_files(folder: Path, *, tokenizer: Any, data: Data) -> None:
    """Write tokenizer, chat template and image processor into the folder, next to the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))
    build_image_processor(data).save_pretrained(str(folder))


def _vocabulary(bpe: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(bpe.to_str())["model"]
    return dict(model["vocab"]), [(left, right) for left, right in model["merges"]]


def _ready(tokenizer: Any) -> Any:
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:  # tokenizer.json without tokenizer_config.json
        tokenizer.pad_token = PAD
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
