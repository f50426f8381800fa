"""Judges image files as frames: one judgement for the index and for loading.

A frame is a whole image of 8 bits a channel that RGB can hold. Header and last bytes decide, or decoding the pixels.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image

PNG_HEAD = b"\x89PNG\r\n\x1a\n"
PNG_END = b"IEND\xaeB`\x82"
JPEG_HEAD = b"\xff\xd8\xff"
JPEG_END = b"\xff\xd9"
JPEG_SCAN = b"\xda"
PNG_CHUNK = struct.Struct(">I4s")  # length, kind; a checksum of 4 bytes follows the content
PADDING = b"\0\r\n "  # behind the end mark, by copy tools
# Bit depth and colour type of IHDR -> Pillow's mode. Any other PNG is opened with Pillow, at five times the cost.
PNG_MODES = {b"\x08\x00": "L", b"\x08\x02": "RGB"}
HEAD_BYTES = 64
TAIL_BYTES = 4096
MAX_PIXELS = 89_478_485  # from here on Pillow warns of a decompression bomb
# Modes that RGB can hold. Of those with an alpha channel, transparent pixels are shown on white, as VGGT's loader does.
OPAQUE_MODES = frozenset({"1", "L", "P", "RGB"})
IS_MISSING = "is missing"
ALPHA_MODES = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})


class FrameError(Exception):
    """Why a file is no frame."""


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """Size in pixels. `reason`: why the file is no frame, empty where it is one. `remark`: what loading does to a frame
    that is not plain RGB, empty for one that is. `fingerprint`: a hash of the file's size and both of its ends.
    """

    width: int
    height: int
    reason: str = ""
    remark: str = ""
    fingerprint: int = 0

    @property
    def is_missing(self) -> bool:
        """Is there no file at all?"""
        return self.reason == IS_MISSING


class _Header(NamedTuple):
    size: tuple[int, int]
    mode: str
    is_16_bit: bool
    has_transparency: bool

    @property
    def remark(self) -> str:
        if self.has_transparency:
            return f"is of mode {self.mode} with transparency: shown on white"
        return "" if self.mode == "RGB" else f"is of mode {self.mode}: read as RGB"


def check_image(path: Path, *, decode: bool) -> ImageFacts:
    """Facts of the file. Without `decode`, by its header, and by whether its format's end mark is there.

    That finds what copying breaks: missing, empty and cut files. A flipped byte in the middle shows in decoding only.
    """
    width = height = fingerprint = 0
    remark = ""
    try:
        with path.open("rb") as file:
            head, tail, num_bytes = _read_ends(file)
            fingerprint = _hash(head, tail, num_bytes)
            header = _read_png_header(head) or _read_header(_open(file))
            width, height = header.size
            remark = header.remark
            _require_frame(header)
            _require_end(file, head, tail)
            if decode:
                _load(_open(file))
    except FrameError as error:
        return ImageFacts(width, height, reason=str(error), fingerprint=fingerprint)
    except FileNotFoundError:
        return ImageFacts(0, 0, reason=IS_MISSING)
    except OSError as error:
        return ImageFacts(0, 0, reason=f"cannot be read as an image ({type(error).__name__}: {error})")
    return ImageFacts(width, height, remark=remark, fingerprint=fingerprint)


def read_frame(path: Path) -> Image.Image:
    """The frame's pixels as RGB. Raises: FrameError with the reason that check_image gives, OSError."""
    with path.open("rb") as file:
        head, tail, _ = _read_ends(file)
        _require_end(file, head, tail)
        image = _open(file)
        header = _read_header(image)
        _require_frame(header)
        _load(image)
        if not header.has_transparency:
            return image.convert("RGB")
        shown = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")


def _read_ends(file: BinaryIO) -> tuple[bytes, bytes, int]:
    num_bytes = os.fstat(file.fileno()).st_size
    if not num_bytes:
        raise FrameError("is empty")
    head = file.read(HEAD_BYTES)
    file.seek(max(0, num_bytes - TAIL_BYTES))
    tail = file.read(TAIL_BYTES)
    return head, tail, num_bytes


def _hash(head: bytes, tail: bytes, num_bytes: int) -> int:
    """63 bits: they fit into a signed column."""
    digest = hashlib.blake2b(b"%d:" % num_bytes + head + tail, digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _require_end(file: BinaryIO, head: bytes, tail: bytes) -> None:
    """Raises: FrameError where a PNG or JPEG stops before its end. Bytes after the end are no part of the image."""
    for start, end, reaches_end in ((PNG_HEAD, PNG_END, _png_reaches_end), (JPEG_HEAD, JPEG_END, _jpeg_reaches_end)):
        if head.startswith(start) and not tail.rstrip(PADDING).endswith(end) and not reaches_end(file):
            raise FrameError("is truncated: the end of the image is missing")


def _png_reaches_end(file: BinaryIO) -> bool:
    """Whether the chunks, each with its length in front, lead to IEND."""
    at = len(PNG_HEAD)
    while True:
        file.seek(at)
        chunk = file.read(PNG_CHUNK.size)
        if len(chunk) < PNG_CHUNK.size:
            return False
        length, kind = PNG_CHUNK.unpack(chunk)
        if kind == PNG_END[:4]:
            return file.read(4) == PNG_END[4:]
        at += PNG_CHUNK.size + length + 4


def _jpeg_reaches_end(file: BinaryIO) -> bool:
    """Whether an end mark follows the first scan. One in a segment before it is a thumbnail's."""
    file.seek(0)
    raw = file.read()
    at = len(JPEG_HEAD) - 1
    while raw[at : at + 1] == b"\xff" and raw[at + 1 : at + 2] != JPEG_SCAN:
        is_fill = raw[at + 1 : at + 2] == b"\xff"
        at += 1 if is_fill else 2 + int.from_bytes(raw[at + 2 : at + 4])
    return JPEG_END in raw[at:]


def _read_png_header(head: bytes) -> _Header | None:
    """The header of a plain PNG; None for every other file. A palette or transparency is before IDAT."""
    if not head.startswith(PNG_HEAD) or head[12:16] != b"IHDR" or head[37:41] != b"IDAT":
        return None
    mode = PNG_MODES.get(head[24:26])
    if mode is None:
        return None
    width, height = struct.unpack(">II", head[16:24])
    return _Header((width, height), mode, is_16_bit=False, has_transparency=False)


def _open(file: BinaryIO) -> Image.Image:
    file.seek(0)
    try:
        return Image.open(file)
    except Exception as error:  # a damaged header can raise anything in a parser; each becomes a listed reason
        raise FrameError(f"cannot be read as an image ({type(error).__name__}: {error})") from error


def _read_header(image: Image.Image) -> _Header:
    # Pillow gives RGB of 16 bits a channel the mode RGB too, and cuts the lower 8 bits off.
    raw_modes = [str(tile[3]) for tile in getattr(image, "tile", ())]
    return _Header(
        image.size,
        image.mode,
        is_16_bit=any(";16" in raw for raw in raw_modes),
        has_transparency=image.mode in ALPHA_MODES or "transparency" in image.info,
    )


def _require_frame(header: _Header) -> None:
    width, height = header.size
    if not 0 < width * height <= MAX_PIXELS:
        raise FrameError(f"is {width}×{height} pixels")
    if header.is_16_bit or header.mode.startswith(("I", "F")):
        raise FrameError(f"is of mode {header.mode} with more than 8 bits a channel: a depth image, no frame")
    if header.mode not in OPAQUE_MODES | ALPHA_MODES:
        raise FrameError(f"is of mode {header.mode}: save it as RGB, a conversion here would change its colours")


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except Exception as error:  # see _open
        raise FrameError(f"cannot be decoded ({type(error).__name__}: {error})") from error
