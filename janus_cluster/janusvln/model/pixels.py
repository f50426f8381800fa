"""uint8 frames -> what the two encoders take, on the frames' device.

Shape legend: S frames, H and W pixels, G patches of all frames.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from janus_cluster.modelspec.frames import PATCH, qwen_grid

MERGE_SIZE = 2
TEMPORAL_PATCH_SIZE = 2


def unit_frames(frames_S3HW: Tensor) -> Tensor:
    """Frames in [0, 1], fp32: the input of VGGT, which normalises them.

    Raises: ValueError unless the frames are uint8 [S, 3, H, W] with S ≥ 1.
    """
    if frames_S3HW.dtype != torch.uint8 or frames_S3HW.ndim != 4 or frames_S3HW.shape[1] != 3 or not len(frames_S3HW):
        raise ValueError(f"frames must be uint8 [S ≥ 1, 3, H, W], not {frames_S3HW.dtype} {list(frames_S3HW.shape)}")
    return frames_S3HW.float() / 255.0


@lru_cache(maxsize=16)
def per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[3, 1, 1] fp32 on `device`, made once: a copy from a list would make the host wait at every call."""
    return torch.tensor(values, device=device)[:, None, None]


def qwen_patches(frames_S3HW: Tensor) -> Tensor:
    """Qwen's pixel_values of uint8 frames: CLIP-normalised patches, four of a 2×2 group in a row.

    Equal to the image processor's output on the same pixels (top rows, no further resizing).
    Shapes: [S, 3, H, W] in; [S · rows · columns, 3 · 2 · 14 · 14] out, fp32.
    """
    _, grid_h, grid_w = qwen_grid(frames_S3HW.shape[3], frames_S3HW.shape[2])
    pixels = unit_frames(frames_S3HW)[:, :, : grid_h * PATCH]
    mean = per_channel(tuple(OPENAI_CLIP_MEAN), pixels.device)
    std = per_channel(tuple(OPENAI_CLIP_STD), pixels.device)
    cell = (MERGE_SIZE, PATCH)
    cells = ((pixels - mean) / std).reshape(-1, 3, grid_h // MERGE_SIZE, *cell, grid_w // MERGE_SIZE, *cell)
    # [S, 3, rows/2, 2, 14, columns/2, 2, 14] -> [S, rows/2, columns/2, 2, 2, 3, 14, 14]
    patches = cells.permute(0, 2, 5, 3, 6, 1, 4, 7)
    still = patches.unsqueeze(6).expand(*patches.shape[:6], TEMPORAL_PATCH_SIZE, *patches.shape[6:])
    return still.reshape(frames_S3HW.shape[0] * grid_h * grid_w, -1)


def merge_groups(features_HWC: Tensor) -> Tensor:
    """A map of patch features in Qwen's order: 2×2 groups row by row; an odd last row or column is left out.

    Shapes: [rows, columns, C] in; [rows//2 · columns//2, 4, C] out.
    """
    rows, columns = (side // MERGE_SIZE for side in features_HWC.shape[:2])
    kept = features_HWC[: rows * MERGE_SIZE, : columns * MERGE_SIZE]
    groups = kept.reshape(rows, MERGE_SIZE, columns, MERGE_SIZE, -1).permute(0, 2, 1, 3, 4)
    return groups.reshape(rows * columns, MERGE_SIZE**2, -1)
