"""A path as one node sees it, short enough to compare between nodes: sizes, times, and hashes of samples."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

_SAMPLE_BYTES = 65536
_MOST_FILES = 64
_MOST_STATS = 2_048
_SPEED_BYTES = 16_000_000


def read_view(path: Path, *, budget_s: float) -> dict[str, str | int | None]:
    """files, bytes, mtime (newest, s) and hash (names; both ends of up to 64 files) of a file or a folder's own files.

    Of very many files bytes, mtime and names are those of 2,048. The hash is None when the time ran out: a node with
    a cold cache has then read less than the others, and must not seem to differ from them.
    Raises: OSError where something that is listed cannot be read.
    """
    deadline = time.monotonic() + budget_s
    files = [path] if path.is_file() else _own_files(path)
    sampled = [(f.name, f.stat()) for f in _spread(files, _MOST_STATS)]
    digest = hashlib.sha256()
    for name, status in sampled:
        digest.update(f"{name}\0{status.st_size}\n".encode("utf-8", "surrogateescape"))
    is_whole = True
    for file in _spread(files, _MOST_FILES):
        is_whole = is_whole and time.monotonic() < deadline
        if is_whole:
            digest.update(_both_ends(file))
    return {
        "files": len(files),
        "bytes": sum(status.st_size for _, status in sampled),
        "mtime": max((int(status.st_mtime) for _, status in sampled), default=0),
        "hash": digest.hexdigest()[:16] if is_whole else None,
    }


def _own_files(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(Path(e.path) for e in entries if e.is_file())


def _spread(files: Sequence[Path], most: int) -> list[Path]:
    """At most so many, evenly; the same ones on every node."""
    step = max(1, -(-len(files) // most))
    return list(files[::step])


def _both_ends(file: Path) -> bytes:
    with file.open("rb") as opened:
        head = opened.read(_SAMPLE_BYTES)
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(len(head), size - _SAMPLE_BYTES))
        return head + opened.read(_SAMPLE_BYTES)


def read_speed_gb_per_s(path: Path) -> float | None:
    """GB/s (1e9) of reading up to 16 MB from the largest file there, past the page cache where the kernel allows it."""
    files = [path] if path.is_file() else _own_files(path)
    largest = max(files, key=lambda f: f.stat().st_size, default=None)
    if largest is None or largest.stat().st_size < 1_000_000:
        return None
    with largest.open("rb", buffering=0) as opened:
        os.posix_fadvise(opened.fileno(), 0, _SPEED_BYTES, os.POSIX_FADV_DONTNEED)
        begun = time.perf_counter()
        count = 0
        while count < _SPEED_BYTES and (piece := opened.read(4_000_000)):
            count += len(piece)
        return count / max(1e-9, time.perf_counter() - begun) / 1e9
