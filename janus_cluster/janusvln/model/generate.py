"""The answer as text: greedy decoding with a key-value cache, on a prompt whose images carry the spatial memory.

Shape legend: L positions of the prompt, S frames of the sample.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from janus_cluster.janusvln.data.tokenizer import EOS, PAD
from janus_cluster.janusvln.model import pixels
from janus_cluster.janusvln.model.janus import JanusModel


@torch.no_grad()
def generate_greedy(
    model: JanusModel,
    *,
    input_ids_L: Tensor,
    mm_token_type_ids_L: Tensor,
    frames_S3HW: Tensor,
    image_grid_thw: Tensor,
    max_new_tokens: int,
    stop_ids: Collection[int],
) -> list[int]:
    """Ids that follow the prompt of one sample, up to and without the first of `stop_ids`.

    The images are encoded and fused once, the prompt is read once; then one token is computed at a time, and it gives
    what reading everything again for each token would. Fewer than `max_new_tokens` ids mean that the model stopped.
    Shapes: frames uint8, oldest first, current last; image_grid_thw [S, 3]; all on the model's device.
    """
    input_ids, mm_types = input_ids_L[None], mm_token_type_ids_L[None]
    fused = model.encode_images(pixels.qwen_patches(frames_S3HW), image_grid_thw, [pixels.unit_frames(frames_S3HW)])
    positions, _ = model.model.get_rope_index(input_ids, mm_types, image_grid_thw=image_grid_thw)
    # The cache goes in by its place and is not read from the output: 5.24 renamed past_key_values to cache in both.
    cache = DynamicCache(config=model.model.language_model.config)
    out = model.model(
        input_ids,
        None,
        positions,
        cache,
        image_grid_thw=image_grid_thw,
        mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=fused)},
        use_cache=True,
    )
    # After an image, text goes on behind the largest of its three positions, not behind the number of tokens.
    next_position = positions.amax() + 1
    generated: list[int] = []
    while len(generated) < max_new_tokens:
        token = model.lm_head(out.last_hidden_state[:, -1]).argmax(-1)
        if int(token) in stop_ids:
            break
        generated.append(int(token))
        out = model.model.language_model(
            token[None],
            None,
            (next_position + len(generated) - 1).expand(3, 1, 1),
            cache,
            use_cache=True,
        )
    return generated


def generate_text(model: JanusModel, tokenizer: Any, *, max_new_tokens: int, **prompt: Tensor) -> tuple[str, bool]:
    """The greedy answer to the prompt (generate_greedy's keys, on any device), and whether it ended by its own end mark
    within `max_new_tokens`.
    """
    stop_ids = {int(tokenizer.convert_tokens_to_ids(name)) for name in (EOS, PAD)}
    on_device = {key: value.to(model.device) for key, value in prompt.items()}
    ids = generate_greedy(model, **on_device, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text, len(ids) < max_new_tokens
