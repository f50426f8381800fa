"""Scan a data set: count episodes, frames and annotations, decode one frame, name the unreadable files."""

from __future__ import annotations

import hashlib
import os
import time
from itertools import takewhile
from pathlib import Path
from typing import Any

_MILESTONES = "milestones_result.json"
_IMAGES = (".png", ".jpg", ".jpeg")
_ANNOTATIONS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")  # R2R and RxR come as train.json.gz
_SHOWN = 5


def scan_data(root: Path, *, budget_s: float) -> dict[str, Any]:
    """Counts under `root`, at most two folders deep; `partial` when the time ran out on a slow file system.

    Returns: episodes, frames, annotations, other, unreadable (names), sample (result of decoding one frame), names
             (hash of the root's listing, to be compared between nodes).
    """
    deadline = time.monotonic() + budget_s
    found: dict[str, Any] = {
        "episodes": 0,
        "frames": 0,
        "annotations": 0,
        "other": 0,
        "unreadable": [],
        "partial": False,
    }
    first_image: Path | None = None
    if root.is_file():
        return found | {"annotations": 1, "sample": None, "names": root.name}
    with os.scandir(root) as entries:
        top = sorted(entries, key=lambda e: e.name)
    for entry in top:
        if time.monotonic() > deadline:
            found["partial"] = True
            break
        if not entry.is_dir():
            first_image = _count(Path(entry.path), found) or first_image
            continue
        try:
            with os.scandir(entry.path) as inside:
                # One folder may hold every frame of a data set: its listing alone can take longer than there is.
                files = sorted(Path(e.path) for e in takewhile(lambda _: time.monotonic() < deadline, inside))
        except OSError as e:
            found["unreadable"].append(f"{entry.name}: {e.strerror}")
            continue
        found["episodes"] += any(f.name == _MILESTONES for f in files)
        for file in files:
            first_image = first_image or (file if file.name.lower().endswith(_IMAGES) else None)
            _count(file, found)
        found["partial"] = time.monotonic() >= deadline
    names = hashlib.sha256("\n".join(e.name for e in top).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    found["unreadable"] = found["unreadable"][:_SHOWN]
    return found | {"sample": decode_image(first_image) if first_image else None, "names": names}


def _count(file: Path, found: dict[str, Any]) -> Path | None:
    """`found` counts the file; the file itself when it is an image."""
    name = file.name.lower()
    if name.endswith(_IMAGES):
        found["frames"] += 1
        return file
    found["annotations" if name.endswith(_ANNOTATIONS) and name != _MILESTONES else "other"] += 1
    return None


def decode_image(path: Path) -> dict[str, Any]:
    """The frame's size after all of it was decoded, or why it could not be."""
    from PIL import Image  # 40 ms that a node without data need not pay

    try:
        with Image.open(path) as image:
            image.load()
            return {"path": str(path), "size": list(image.size), "error": None}
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        return {"path": str(path), "size": None, "error": str(e)}
