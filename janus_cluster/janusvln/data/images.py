"""Image file -> resized uint8 pixels.

Pixels stay uint8 until they are on the device: normalising there is bit-identical and a sixteenth of the traffic.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from janus_cluster.errors import FILE_SYSTEM_FAULTS, TrainingFailed
from janus_cluster.janusvln.data.image_check import FrameError, read_frame
from janus_cluster.job.schema import Data
from janus_cluster.modelspec.frames import frame_size

WHITE = 255


def load_frames(
    paths: Sequence[Path], data: Data, *, sizes: Sequence[tuple[int, int]] | None = None
) -> NDArray[np.uint8]:
    """The frames of one sample, resized alike, each file decoded once. `sizes`: of the files, where they are known.

    Shapes:  [S, 3, H, W]; pad mode: H = W.
    Raises:  TrainingFailed naming the file that cannot be decoded, has another size than the current frame, or is no
             longer of the size that is known.
    """
    known = dict(zip(paths, sizes, strict=True)) if sizes else {}
    decoded = {path: load_frame(path, data, size=known.get(path)) for path in dict.fromkeys(paths)}
    current = paths[-1]
    for path, pixels in decoded.items():
        if pixels.shape != decoded[current].shape:
            raise TrainingFailed(
                f"{path} is {_size(pixels)} after resizing, but the current frame {current.name} "
                f"is {_size(decoded[current])}",
                hint="frames of one sample need one aspect ratio; data.image_mode=pad accepts mixed ones",
                kind="bad_data",
            )
    return np.stack([decoded[path] for path in paths])


def load_frame(path: Path, data: Data, *, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """One frame as RGB, resized (bicubic). Pad mode: padded with white to a square. Crop mode: the middle of a frame
    that is taller than wide.

    Shapes:  [3, H, W], H <= W.
    Raises:  TrainingFailed naming the file.
    """
    image = _decode(path)
    if size is not None and image.size != size:
        raise TrainingFailed(
            f"{path} is {image.width}×{image.height} pixels; it was {size[0]}×{size[1]} when its episode was indexed",
            hint="bring the file back, then resume; replaced on purpose: remove the index in data.index_dir first",
            kind="bad_data",
        )
    return prepare_image(image, data)


def prepare_image(image: Image.Image, data: Data) -> NDArray[np.uint8]:
    """The picture as load_frame gives it. Shapes: [3, H, W], H <= W."""
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
        if isinstance(error, OSError) and error.errno in FILE_SYSTEM_FAULTS:
            raise TrainingFailed(f"{path}: {error}", kind="file_system") from error
        raise TrainingFailed(
            f"{path}: cannot be decoded ({error})",
            hint="replace the file; --set data.verify_images=decode finds all like it before training, for data.on_bad",
            kind="bad_data",
        ) from error


def _size(pixels: NDArray[np.uint8]) -> str:
    return f"{pixels.shape[2]}×{pixels.shape[1]}"
