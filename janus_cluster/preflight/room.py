"""How much disk a run will need, computed from the sizes of its network as `plan` counts them."""

from __future__ import annotations

from janus_cluster.errors import UsageError
from janus_cluster.job.schema import JobConfig
from janus_cluster.modelspec.sizes import load_sizes, preset_sizes

# Adam under mixed precision: fp32 weight, momentum and variance (12), and the 16-bit weight (2). fp32: no 16-bit copy.
_STATE_BYTES = {"bf16": 14, "fp32": 16}
_WEIGHT_BYTES = {"bf16": 2, "fp32": 4}


def checkpoint_room_bytes(job: JobConfig) -> int:
    """Bytes for the checkpoints a run keeps, the one that is being written, and its exports; 0 when nothing is trained.

    A checkpoint holds the trained weights and the optimizer's states.
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
    """(all weights with VGGT, the trained ones) of the job's network; the preset's where model.path cannot be read."""
    try:
        sizes = load_sizes(job.model)
    except (UsageError, KeyError, TypeError):
        # paths.model reports what is wrong with it.
        sizes = preset_sizes(job.model.preset)
    total = sum(sizes.parameters.values()) + sizes.vggt_parameters
    return total, sizes.trained_parameters(job.training.tune, job.training.lora)
