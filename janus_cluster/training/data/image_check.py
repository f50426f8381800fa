"""Is a file a whole image, and how large? By its first and last bytes, or by decoding it."""

from __future__ import annotations

import io
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

PNG_HEAD = b"\x89PNG\r\n\x1a\n"
PNG_DEPTH = b"\x10\x00"  # bits of a sample, and grey
PNG_END = b"IEND\xaeB`\x82"
JPEG_HEAD = b"\xff\xd8\xff"
JPEG_END = b"\xff\xd9"
# Some writers add a few bytes behind the image's own end, which decoders ignore.
TAIL_BYTES = 4096
MAX_PIXELS = 89_478_485  # from here on Pillow warns of a decompression bomb


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """Size in pixels; `reason` says why the file cannot be used, and is empty where it can."""

    width: int
    height: int
    reason: str = ""


def check_image(path: Path, *, decode: bool) -> ImageFacts:
    """What is known of the file. Without `decode`, by its header, and by whether its format's end mark is there.

    That finds what copying breaks: missing, empty and cut files. A flipped byte in the middle shows in decoding only.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                return ImageFacts(0, 0, "is empty")
            head = file.read(32)
            file.seek(max(0, size - TAIL_BYTES))
            tail = file.read(TAIL_BYTES)
        width, height = _size(path, head)
    except FileNotFoundError:
        return ImageFacts(0, 0, "is missing")
    except Exception as error:  # a damaged header can raise anything in a parser; each becomes a listed reason
        return ImageFacts(0, 0, f"cannot be read as an image ({type(error).__name__}: {error})")
    reason = _judge(width, height, head, tail)
    return ImageFacts(width, height, reason or (_decoding_error(path) if decode else ""))


def _size(path: Path, head: bytes) -> tuple[int, int]:
    if head.startswith(PNG_HEAD) and head[12:16] == b"IHDR":
        width, height = struct.unpack(">II", head[16:24])
        return width, height
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        return image.size


def _judge(width: int, height: int, head: bytes, tail: bytes) -> str:
    if not 0 < width * height <= MAX_PIXELS:
        return f"is {width}×{height} pixels"
    if head.startswith(PNG_HEAD) and head[24:26] == PNG_DEPTH:
        return "has 16 bits of grey, which a depth image has, and no frame"
    for start, end in ((PNG_HEAD, PNG_END), (JPEG_HEAD, JPEG_END)):
        if head.startswith(start) and end not in tail:
            return "is truncated: the end of the image is missing"
    return ""


def _decoding_error(path: Path) -> str:
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # see check_image
        return f"cannot be decoded ({type(error).__name__}: {error})"
    return ""
