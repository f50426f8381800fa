"""Bytes on one GPU at the fullest moment of a step, part by part. No torch.

What is allocated all the time (weights, gradients, optimizer state, VGGT, buckets) plus the larger of three moments:
encoding the frames, the start of the backward pass, and the optimizer's step. e is the bytes of an element.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from janus_cluster.modelspec.sizes import Sizes
from janus_cluster.plan.sample import Sample
from janus_cluster.plan.setup import Setup

GB = 1e9
# fp32 master weight and AdamW's two moments.
OPTIMIZER_BYTES = 12
FP32 = 4
FP64 = 8
# Widths of temporaries that live at once inside one block without gradient, followed through the real networks
# (tests/janusvln/plan_on_meta.py): 17.8 in VGGT's global block, 17.4 in Qwen's vision block (queries and keys turned in
# fp32).
VGGT_WIDTHS = 18
VISION_WIDTHS = 18


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU. `optimizer`: on the GPU; `host_per_node`: moved to the host by offloading."""

    weights: float
    gradients: float
    optimizer: float
    vggt: float
    buckets: float
    activations: float
    logits: float
    encoder: float
    step: float
    host_per_node: float

    @property
    def states(self) -> float:
        """Allocated all the time, VGGT's weights included."""
        return self.weights + self.gradients + self.optimizer + self.vggt

    @property
    def resident(self) -> float:
        return self.states + self.buckets

    @property
    def passing(self) -> float:
        """Temporary: the fullest of the three moments of a step."""
        return max(self.encoder, self.activations + self.logits, self.step)

    @property
    def total(self) -> float:
        return self.resident + self.passing

    def in_gb(self) -> dict[str, float]:
        """Every part and the total in GB (1e9 bytes), rounded."""
        names = (
            "weights", "gradients", "optimizer", "vggt", "buckets", "activations", "logits", "encoder", "step",
            "host_per_node", "total",
        )  # fmt: skip
        return {name: round(getattr(self, name) / GB, 2) for name in names}


def plan_memory(sizes: Sizes, sample: Sample, setup: Setup) -> Memory:
    """The memory of one GPU that trains micro-batches of `sample`."""
    weights, gradients, optimizer = state_bytes(sizes, setup)
    trained = sizes.trained_parameters(setup.work.tune, setup.work.lora)
    host = 0.0
    share = trained / (setup.world_size if setup.stage else 1)
    gradients += _gradient_copies(sizes, setup)
    if setup.offload_optimizer:
        host += (OPTIMIZER_BYTES + FP32) * share * setup.ranks_per_node
        optimizer = 0.0
        # Each gradient goes to the host when its bucket is reduced.
        gradients = 0.0 if setup.stage >= 2 else gradients
    if setup.offload_parameters:
        host += setup.element_bytes * sizes.engine_parameters(setup.work.lora) / setup.nodes
        weights = float(setup.element_bytes * sizes.small_parameters(setup.persistence_threshold))
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        vggt=float(setup.element_bytes * sizes.vggt_parameters),
        buckets=_buckets(sizes, setup),
        activations=activation_bytes(sizes, sample, setup) + _backward_workspace(sizes, sample, setup),
        logits=_logits(sizes, sample, setup),
        encoder=_encoder(sizes, sample, setup),
        step=0.0 if setup.offload_optimizer else _step(sizes, setup, share),
        host_per_node=host,
    )


def _gradient_copies(sizes: Sizes, setup: Setup) -> float:
    """What ZeRO-1 and 2 keep of gradients on the fullest rank beyond `state_bytes`, with the activations still there.

    A rank's copies are of whole tensors, also of those that its part has only a piece of. ZeRO-2 allocates one for the
    running micro-step, beside the sum of the earlier ones; ZeRO-1 one in the last micro-step, beside all gradients.
    """
    if setup.stage not in {1, 2}:
        return 0.0
    work, e, sums = setup.work, setup.element_bytes, setup.accumulation > 1
    held = e * touched_elements(sizes.trained_groups(work.tune, work.lora), setup.world_size)
    if setup.stage == 1:
        return float(held * int(sums))
    share = e * sizes.trained_parameters(work.tune, work.lora) / setup.world_size
    return held * (1 + int(sums)) - share


def touched_elements(groups: Sequence[Sequence[int]], ranks: int) -> int:
    """Elements of all tensors of which a rank's part has a piece, on the rank where they are most.

    Each group is flat, one tensor after the other, and is cut into equal parts.
    """
    held = [0] * ranks
    for group in groups:
        part, start = -(-sum(group) // ranks), 0
        for count in group:
            for rank in range(start // part, (start + count - 1) // part + 1):
                held[rank] += count
            start += count
    return max(held)


def _step(sizes: Sizes, setup: Setup, share: float) -> float:
    """The optimizer's step: a flat copy of this rank's gradients and the same in fp32; before it, for the norm, one
    tensor's piece in fp64."""
    return max((FP32 + setup.element_bytes) * share, FP64 * min(sizes.largest_tensor, share))


def state_bytes(sizes: Sizes, setup: Setup) -> tuple[float, float, float]:
    """Weights, gradients and optimizer state of one rank, nothing offloaded, without VGGT.

    ZeRO-1 cuts the optimizer state among the ranks, ZeRO-2 the gradients too, ZeRO-3 the weights too, the frozen ones
    included; there, tensors up to the persistence threshold stay whole on every rank.
    """
    work, e = setup.work, setup.element_bytes
    trained = sizes.trained_parameters(work.tune, work.lora)
    everything = sizes.engine_parameters(work.lora)
    ranks = setup.world_size
    weights = e * everything / (ranks if setup.stage == 3 else 1)
    if setup.stage == 3:
        weights += e * sizes.small_parameters(setup.persistence_threshold)
    gradients = e * trained / (ranks if setup.stage >= 2 else 1)
    optimizer = OPTIMIZER_BYTES * trained / (ranks if setup.stage >= 1 else 1)
    return weights, gradients, optimizer


def layer_bytes_per_token(sizes: Sizes, element_bytes: int) -> float:
    """What one language layer keeps of each token for its backward pass, through a fused attention kernel.

    Both norms keep their input in fp32 (4 each), its normalised copy and their result (e each); attention its queries
    and result (e each), keys and values (e each, at their own width) and a number per head; the MLP four tensors of
    its width (e each); both norms one more number. Measured with torch's saved-tensor hooks: equal to the byte.
    """
    language, e = sizes.language, element_bytes
    # In fp32 a norm's input is the residual stream, which it shares with its normalised copy's product: one tensor.
    norms = 2 * (FP32 + 2 * e) * language.hidden
    attention = 2 * e * language.hidden + 2 * e * language.kv_dim + FP32 * language.heads
    return norms + attention + 4 * e * language.wide + 2 * FP32


def activation_bytes(sizes: Sizes, sample: Sample, setup: Setup) -> float:
    """What the layers of the language model and what learns before it keep for the backward pass."""
    work, e = setup.work, setup.element_bytes
    tokens = setup.micro_batch * sample.tokens
    language = sizes.language
    kept = 0.0
    if work.reaches_language:
        again = math.ceil(language.layers / work.recompute_every) if work.recompute_every else 0
        whole = (language.layers - again) * layer_bytes_per_token(sizes, e)
        final_norm = (FP32 + e) * language.hidden
        kept += tokens * (whole + again * e * language.hidden + final_norm)
    if work.tune.vggt_merger:
        inputs = sizes.vggt.feature_dim * sizes.vision.merge**2
        per_token = (FP32 + e) * inputs + 2 * e * sizes.vggt_merger_dim
        kept += setup.micro_batch * sample.memory_tokens * per_token
    if work.tune.projector or work.tune.vision:
        # Its norm on every patch, then three tensors of four patches' width for each token.
        norm = e + FP32 * int(work.tune.vision)
        kept += setup.micro_batch * sample.vision_patches * sizes.vision.dim * (norm + 3 * e)
    if work.tune.vision:
        kept += setup.micro_batch * _vision_bytes(sizes, sample, setup)
    return kept


def _vision_bytes(sizes: Sizes, sample: Sample, setup: Setup) -> float:
    """The vision tower where it learns: recomputed block by block, or kept whole.

    As a language layer, but the values keep the whole product of queries, keys and values alive.
    """
    vision, e = sizes.vision, setup.element_bytes
    per_block = 2 * (FP32 + 2 * e) * vision.dim + 7 * e * vision.dim + 4 * e * vision.wide
    blocks = vision.depth * (e * vision.dim if setup.work.recompute_every else per_block)
    return float(sample.vision_patches * (e * vision.patch_inputs + blocks))


def _backward_workspace(sizes: Sizes, sample: Sample, setup: Setup) -> float:
    """What the backward pass needs beside what was kept: one layer computed again, its gradients, a whole gradient."""
    if not setup.work.reaches_language:
        return 0.0
    e, language = setup.element_bytes, sizes.language
    tokens = setup.micro_batch * sample.tokens
    again = layer_bytes_per_token(sizes, e) if setup.work.recompute_every else 0.0
    gradients = e * (3 * language.wide + 4 * language.hidden)
    largest = sizes.largest_tensor if setup.work.learns_language and setup.stage >= 2 else 0
    return tokens * (again + gradients) + e * largest


def _logits(sizes: Sizes, sample: Sample, setup: Setup) -> float:
    """Logits, their fp32 copy's log-probabilities, and the gradients of both, at the positions that have a label."""
    positions = sample.tokens if setup.work.head_on_all else sample.label_tokens
    copies = 2 * setup.element_bytes + 3 * FP32
    return float(setup.micro_batch * positions * sizes.language.vocabulary * copies)


def _encoder(sizes: Sizes, sample: Sample, setup: Setup) -> float:
    """The fuller of two moments: the vision tower's pass (the whole micro-batch), and VGGT's after it (one sample at a
    time), with what the tower's merger keeps. Patches and frames in fp32 are allocated during both."""
    e, rows, vision = setup.element_bytes, setup.micro_batch, sizes.vision
    patches = rows * sample.vision_patches
    frames = 3 * FP32 * sample.frames * sample.width * sample.height
    tower = patches * e * (VISION_WIDTHS * vision.dim + vision.patch_inputs)
    merger = 4 * e * vision.dim * patches if setup.work.tune.projector else 0
    embeds = rows * sample.image_tokens * sizes.language.hidden * e
    tokens = sample.frames * (sample.vggt_patches + sizes.vggt.num_special_tokens)
    memory = merger + embeds + tokens * VGGT_WIDTHS * sizes.vggt.embed_dim * e + frames
    return float(rows * frames + patches * vision.patch_inputs * FP32 + max(tower, memory))


def _buckets(sizes: Sizes, setup: Setup) -> float:
    """DeepSpeed's own buffers.

    ZeRO-1 and 2: the reduction bucket, a second one where communication overlaps, and a flat copy on its way.
    ZeRO-3: one bucket, its copy, and the gathered weights that may live at once, prefetched ones included.
    """
    e = setup.element_bytes
    if not setup.stage:
        return float(e * min(setup.reduce_bucket, sizes.engine_parameters(setup.work.lora)))
    copies = 2 + int(setup.overlap and setup.stage < 3)
    buffers = e * copies * setup.reduce_bucket
    if setup.stage == 3:
        live = max(setup.live_parameters, setup.prefetch_bucket)
        buffers += e * min(live, sizes.engine_parameters(setup.work.lora))
    return float(buffers)
