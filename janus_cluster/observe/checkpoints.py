"""The newest complete checkpoint of a run, told without torch: training/checkpoint.py writes its manifest last."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from janus_cluster.rundir import RunDir, read_json

_MANIFEST_NAME = "manifest.json"
_FOLDER = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, kw_only=True)
class CheckpointFound:
    """A whole checkpoint. Units: completed_at epoch seconds."""

    path: Path
    step: int
    completed_at: float


def find_newest_checkpoint(run: RunDir) -> CheckpointFound | None:
    """The whole checkpoint with the highest step: its manifest and every file it names, with the size they had.

    Hashes are not read again: that is the resuming attempt's work, and it may take minutes.
    """
    try:
        folders = [(int(m[1]), p) for p in run.checkpoints.iterdir() if (m := _FOLDER.fullmatch(p.name))]
    except OSError:
        return None
    for step, folder in sorted(folders, reverse=True):
        try:
            files = _sizes(read_json(folder / _MANIFEST_NAME))
            if all((folder / name).stat().st_size == size for name, size in files.items()):
                when = (folder / _MANIFEST_NAME).stat().st_mtime
                return CheckpointFound(path=folder, step=step, completed_at=when)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None


def _sizes(manifest: dict[str, Any]) -> dict[str, int]:
    """Bytes by file name. Raises: KeyError, TypeError, AttributeError for another shape."""
    if "files_bytes" in manifest:
        return {str(name): int(size) for name, size in manifest["files_bytes"].items()}
    return {str(name): int(entry["bytes"]) for name, entry in manifest["files"].items()}
