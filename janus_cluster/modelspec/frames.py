"""What resizing makes of a frame: its size, and the grid of patches that Qwen sees of it. Numbers only, no pixels.

Training resizes by it and the plan counts by it.
"""

from __future__ import annotations

from janus_cluster.job.schema import Data

PATCH = 14
TOKEN = 28  # 2 × 2 patches become one token, so Qwen needs both sides in multiples of this

Grid = tuple[int, int, int]


def frame_size(width: int, height: int, data: Data) -> tuple[int, int]:
    """(width, height) that a frame is resized to, before it is cropped or padded to a square.

    Crop: `image_width` wide, the height rounded to whole patches. Pad: the longer side is `image_width`. Where what is
    left of it has fewer than min_pixels or more than max_pixels, the next multiple of 28 that does not; max_pixels
    wins where both cannot hold (784, the least that it may be, is 28 × 28).
    """
    target = data.image_width
    while _pixels(width, height, target, data) < data.min_pixels:
        target += TOKEN
    while _pixels(width, height, target, data) > data.max_pixels:
        target -= TOKEN
    return _scaled(width, height, target, data)


def frame_shape(width: int, height: int, data: Data) -> tuple[int, int]:
    """(width, height) of what `load_frame` makes of a file of that size."""
    width, height = frame_size(width, height, data)
    if data.image_mode == "pad":
        return max(width, height), max(width, height)
    return width, min(width, height)


def qwen_grid(width: int, height: int) -> Grid:
    """Patches (time, rows, columns) that Qwen sees of a frame: the top rows, an even number, since 2×2 become a token.

    Raises: ValueError unless the height is a multiple of 14, the width one of 28, and one 2×2 group fits.
    """
    if height % PATCH or width % TOKEN or height < TOKEN or width < TOKEN:
        raise ValueError(f"frames are {height}x{width} pixels; the height must be n·14 ≥ 28, the width n·28")
    return (1, height // TOKEN * 2, width // PATCH)


def _scaled(width: int, height: int, target: int, data: Data) -> tuple[int, int]:
    if data.image_mode == "pad" and height > width:
        return max(round(width * (target / height) / PATCH) * PATCH, PATCH), target
    # The order of these float operations is the reference's: 480 × (644 / 640) / 14 is 34.50000000000001 and rounds up.
    scaled_height = round(height * (target / width) / PATCH) * PATCH
    return target, max(scaled_height, PATCH if data.image_mode == "pad" else TOKEN)


def _pixels(width: int, height: int, target: int, data: Data) -> int:
    if data.image_mode == "pad":
        return target * target
    scaled_width, scaled_height = _scaled(width, height, target, data)
    return scaled_width * min(scaled_width, scaled_height)
