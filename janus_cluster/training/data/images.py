"""Image file -> resized uint8 pixels.

Pixels stay uint8 until they are on the device: normalising there is bit-identical and a sixteenth of the traffic.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from janus_cluster.config.frames import frame_size
from janus_cluster.config.schema import Data
from janus_cluster.errors import TrainingFailed
from janus_cluster.training.data.image_check import FrameError, read_frame

WHITE = 255


def load_frames(paths: Sequence[Path], data: Data) -> NDArray[np.uint8]:
    """The frames of one sample, resized alike, each file decoded once.

    Shapes:  [S, 3, H, W]; pad mode: H = W.
    Raises:  TrainingFailed naming the file that cannot be decoded or has another size than the current frame.
    """
    decoded = {path: load_frame(path, data) for path in dict.fromkeys(paths)}
    current = paths[-1]
    for path, pixels in decoded.items():
        if pixels.shape != decoded[current].shape:
            raise TrainingFailed(
                f"{path} is {_size(pixels)} after resizing, but the current frame {current.name} "
                f"is {_size(decoded[current])}",
                hint="frames of one sample need one aspect ratio; data.image_mode=pad accepts mixed ones",
            )
    return np.stack([decoded[path] for path in paths])


def load_frame(path: Path, data: Data) -> NDArray[np.uint8]:
    """One frame as RGB, resized (bicubic). Pad mode: padded with white to a square. Crop mode: the middle of a frame
    that is taller than wide.

    Shapes:  [3, H, W], H <= W.
    Raises:  TrainingFailed naming the file.
    """
    image = _decode(path)
    width, height = frame_size(*image.size, data)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    if data.image_mode == "pad":
        side = max(width, height)
        canvas = Image.new("RGB", (side, side), (WHITE, WHITE, WHITE))
        canvas.paste(image, ((side - width) // 2, (side - height) // 2))
        image = canvas
    elif height > width:
        top = (height - width) // 2
        image = image.crop((0, top, width, top + width))
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))


def _decode(path: Path) -> Image.Image:
    try:
        return read_frame(path)
    except (FrameError, OSError) as error:
        raise TrainingFailed(
            f"{path}: cannot be decoded ({error})",
            hint="replace the file; --set data.verify_images=decode finds all like it before training, for data.on_bad",
        ) from error


def _size(pixels: NDArray[np.uint8]) -> str:
    return f"{pixels.shape[2]}×{pixels.shape[1]}"
