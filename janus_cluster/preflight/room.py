"""How much disk a run will need, worked out from the model's numbers. Pure."""

from __future__ import annotations

from math import prod

from janus_cluster.config.networks import PRESETS
from janus_cluster.config.schema import JobConfig
from janus_cluster.config.weight_names import LANGUAGE_LINEAR_LAYERS, janus_shapes, vggt_shapes

# Adam under mixed precision: fp32 weight, momentum and variance (12), and the 16-bit weight (2). fp32: no 16-bit copy.
_STATE_BYTES = {"bf16": 14, "fp32": 16}
_WEIGHT_BYTES = {"bf16": 2, "fp32": 4}
_TINY_VOCABULARY = 1000


def checkpoint_room_bytes(job: JobConfig) -> int:
    """Bytes for the checkpoints a run keeps, the one that is being written, and its exports; 0 when nothing is trained.

    A checkpoint holds what learns: its weights and the optimizer's states.
    """
    if not job.data.roots:
        return 0
    total, learning = count_parameters(job)
    precision = job.training.precision
    num_exports = job.checkpoint.export + (job.checkpoint.export and job.checkpoint.export_layout == "janusvln")
    export = num_exports * total * _WEIGHT_BYTES[precision]
    return (_num_checkpoints(job) + 1) * learning * _STATE_BYTES[precision] + export


def _num_checkpoints(job: JobConfig) -> int:
    """How many the run keeps at its end; those of keep_every only where the number of steps is in the job."""
    checkpoint, max_steps = job.checkpoint, job.training.max_steps
    kept_for_ever = max_steps // checkpoint.keep_every if checkpoint.keep_every and max_steps else 0
    return checkpoint.keep_last + kept_for_ever


def count_parameters(job: JobConfig) -> tuple[int, int]:
    """(all weights with VGGT, those that learn) of the job's preset."""
    preset = PRESETS[job.model.preset]
    shapes = janus_shapes(
        {
            "vocab_size": _TINY_VOCABULARY,
            **preset.text,
            "vision_config": preset.vision,
            "vggt_config": preset.vggt.to_dict(),
            "vggt_merger_hidden_dim": preset.vggt_merger_hidden_dim,
            "tie_word_embeddings": preset.tie_word_embeddings,
        }
    )
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    total = sum(sizes.values()) + sum(prod(shape) for shape in vggt_shapes(preset.vggt).values())
    return total, sum(size for name, size in sizes.items() if _learns(name, job)) + _adapters(shapes, job)


def _learns(name: str, job: JobConfig) -> bool:
    tune = job.training.tune
    if name.startswith("model.visual.merger."):
        return tune.projector
    if name.startswith("model.visual."):
        return tune.vision
    if name.startswith("merger."):
        return tune.vggt_merger
    if name.startswith("action_head."):
        return tune.action_head
    return tune.llm and not job.training.lora.enabled


def _adapters(shapes: dict[str, tuple[int, ...]], job: JobConfig) -> int:
    """Weights of the low-rank adapters: rank times both sides of every layer that gets one."""
    lora = job.training.lora
    if not (lora.enabled and job.training.tune.llm):
        return 0
    layers = [f".{name}.weight" for name in lora.target_modules if name in LANGUAGE_LINEAR_LAYERS]
    return sum(
        lora.rank * sum(shape)
        for name, shape in shapes.items()
        if name.startswith("model.language_model.") and name.endswith(tuple(layers) or ("\0",))
    )
