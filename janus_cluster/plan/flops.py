"""Floating point operations of one sample, part by part; a multiply-add counts as 2. No torch.

Shape legend: S frames, N tokens of a frame in VGGT, P patches of a frame, C width, L tokens of the sample.
Counted are matrix products, convolutions and attention; norms, activations and the loss are below 1 % of them.
Backward: 2 per weight and token for the gradient of the input, 2 for that of the weight, each only where needed;
attention's backward counts twice its forward (what a flash kernel computes again is not counted).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property

from janus_cluster.job.schema import Lora, Tune
from janus_cluster.modelspec.sizes import Sizes
from janus_cluster.plan.sample import Sample


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is computed of a sample, besides its size.

    `recompute_every` n: every n-th language layer is computed again in the backward pass; 0: none.
    `whole_recompute`: also the layer's last product, which torch leaves out (nothing after it needs it).
    `causal`: attention computes only what a causal mask leaves, as flash kernels do; else the whole square.
    `whole_vggt`: all 24 layers for all frames, as VGGT is published; else what the memory needs.
    `head_on_all`: logits at every position instead of the labels'.
    """

    tune: Tune = field(default_factory=Tune)
    lora: Lora = field(default_factory=Lora)
    recompute_every: int = 1
    whole_recompute: bool = False
    causal: bool = True
    whole_vggt: bool = False
    head_on_all: bool = False

    @property
    def reaches_language(self) -> bool:
        """True where gradients go through the language model."""
        return self.tune.llm or self.tune.projector or self.tune.vggt_merger or self.tune.vision

    @property
    def learns_language(self) -> bool:
        """True where the language model's own matrices learn."""
        return self.tune.llm and not self.lora.enabled


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations of one sample, in FLOP; `llm_*` without lm_head, which is `head`."""

    vision: float
    dino: float
    vggt_frame: float
    vggt_global: float
    mergers: float
    llm_forward: float
    llm_backward: float
    recompute: float
    head: float

    @property
    def vggt(self) -> float:
        return self.dino + self.vggt_frame + self.vggt_global

    @property
    def backward(self) -> float:
        """What gradient communication can overlap with: the language model's backward pass with its recomputing."""
        return self.llm_backward + self.recompute

    @cached_property
    def total(self) -> float:
        """Everything the GPU computes."""
        return float(sum(getattr(self, part.name) for part in fields(self)))

    @property
    def model(self) -> float:
        """Without recomputing: what MFU counts."""
        return self.total - self.recompute

    def tflop(self) -> Mapping[str, float]:
        """Every part and the total in TFLOP, rounded."""
        values = {part.name: getattr(self, part.name) for part in fields(self)} | {"total": self.total}
        return {name: round(value / 1e12, 3) for name, value in values.items()}


def count_flops(sizes: Sizes, sample: Sample, work: Work) -> Flops:
    """The operations of one training pass over one sample."""
    forward = _language_layers(sizes, sample.tokens, causal=work.causal)
    dino, frame, over_frames = _vggt(sizes, sample, whole=work.whole_vggt)
    return Flops(
        vision=_vision(sizes, sample, work),
        dino=dino,
        vggt_frame=frame,
        vggt_global=over_frames,
        mergers=_mergers(sizes, sample, work),
        llm_forward=forward.total + _adapters(sizes, sample.tokens, work.lora),
        llm_backward=_language_backward(sizes, sample, forward, work),
        recompute=_recompute(sizes, sample, forward, work),
        head=_heads(sizes, sample, work),
    )


@dataclass(frozen=True)
class _Layers:
    """Operations of a stack of layers, forward."""

    linear: float
    attention: float

    @property
    def total(self) -> float:
        return self.linear + self.attention


def _attention(queries: float, keys: float, width: int) -> float:
    """Scores and their mixing: two products of width `width` for every pair."""
    return 4.0 * queries * keys * width


def _language_layers(sizes: Sizes, tokens: int, *, causal: bool) -> _Layers:
    language = sizes.language
    square = _attention(tokens, tokens, language.hidden) * language.layers
    return _Layers(2.0 * tokens * language.layer_weights * language.layers, square / 2 if causal else square)


def _adapters(sizes: Sizes, tokens: int, lora: Lora) -> float:
    return 2.0 * tokens * sizes.adapter_parameters(lora)


def _language_backward(sizes: Sizes, sample: Sample, forward: _Layers, work: Work) -> float:
    if not work.reaches_language:
        return 0.0
    linear = forward.linear * (2 if work.learns_language else 1)
    return linear + 2 * forward.attention + 2 * _adapters(sizes, sample.tokens, work.lora)


def _recompute(sizes: Sizes, sample: Sample, forward: _Layers, work: Work) -> float:
    """The forward pass of every n-th layer once more; torch stops before the last product, whose result none needs."""
    if not work.recompute_every or not work.reaches_language:
        return 0.0
    language = sizes.language
    share = math.ceil(language.layers / work.recompute_every) / language.layers
    again = forward.total + _adapters(sizes, sample.tokens, work.lora)
    if not work.whole_recompute:
        again -= 2.0 * sample.tokens * language.wide * language.hidden * language.layers
    return again * share


def _vision(sizes: Sizes, sample: Sample, work: Work) -> float:
    """The vision tower: most blocks attend inside windows, a few over the frame."""
    vision = sizes.vision
    per_frame = sample.rows * sample.columns
    window = vision.window
    down, across = (_window_sides(side // vision.merge, window) for side in (sample.rows, sample.columns))
    in_windows = sum((a * b * vision.merge**2) ** 2 for a in down for b in across)
    attention = _attention(1, in_windows, vision.dim) * (vision.depth - vision.full_blocks)
    attention += _attention(per_frame, per_frame, vision.dim) * vision.full_blocks
    linear = 2.0 * per_frame * vision.block_weights * vision.depth
    embed = 2.0 * per_frame * vision.patch_inputs * vision.dim
    once = linear + attention
    if not work.tune.vision:
        return sample.frames * (embed + once)
    # Each block is recomputed where recomputing is on; the first layer's input needs no gradient.
    again = 0.0
    if work.recompute_every:
        again = once if work.whole_recompute else once - 2.0 * per_frame * vision.wide * vision.dim * vision.depth
    return sample.frames * (2 * embed + 3 * once + again)


def _window_sides(cells: int, window: int) -> list[int]:
    """Sides of the windows along one edge: full ones, and what is left."""
    full, rest = divmod(cells, window)
    return [window] * full + ([rest] if rest else [])


def _vggt(sizes: Sizes, sample: Sample, *, whole: bool) -> tuple[float, float, float]:
    """DINOv2, frame blocks and global blocks, forward only: VGGT is frozen.

    A frame's queries meet the keys of that frame and of the earlier ones: S(S+1)/2 pairs of frames, not S².
    """
    config, frames = sizes.vggt, sample.frames
    tokens, c = sample.vggt_patches + config.num_special_tokens, config.embed_dim
    linear_per_token = 2.0 * (4 + 2 * config.mlp_ratio) * c * c
    in_frame = frames * (tokens * linear_per_token + _attention(tokens, tokens, c))
    embed = 2.0 * frames * sample.vggt_patches * 3 * config.patch_size**2 * c
    pairs = frames * (frames + 1) / 2
    over_frames = frames * tokens * linear_per_token + pairs * _attention(tokens, tokens, c)
    dino = embed + config.dino_depth * in_frame
    if whole:
        return dino, config.depth * in_frame, config.depth * over_frames
    # Of the last global block only the current frame is wanted: keys and values of all frames, the rest of one.
    last = 2.0 * frames * tokens * 3 * c * c + frames * _attention(tokens, tokens, c)
    last += 2.0 * tokens * (1 + 2 * config.mlp_ratio) * c * c
    layers = config.depth - 1
    return dino, layers * in_frame, (layers - 1) * over_frames + last


def _mergers(sizes: Sizes, sample: Sample, work: Work) -> float:
    """Qwen's merger on every image, VGGT's on the memory. Their first norm learns with them, so both matrices'
    inputs need a gradient."""
    images = 2.0 * sample.image_tokens * sizes.vision.merger_weights
    memory = 2.0 * sample.memory_tokens * sizes.vggt_merger_weights
    image_factor = 1 + int(work.tune.projector or work.tune.vision) + int(work.tune.projector)
    return images * image_factor + memory * (1 + 2 * int(work.tune.vggt_merger))


def _heads(sizes: Sizes, sample: Sample, work: Work) -> float:
    """lm_head at the labels' positions, and the action head at one."""
    language = sizes.language
    positions = sample.tokens if work.head_on_all else sample.label_tokens
    logits = 2.0 * positions * language.vocabulary * language.hidden
    actions = 2.0 * sizes.action_head_dim * (language.hidden + sizes.num_actions)
    factor = 1 + int(work.reaches_language) + int(work.learns_language)
    return logits * factor + actions * (1 + 2 * int(work.tune.action_head))
