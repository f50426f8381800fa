"""Which checkpoints of a run are whole: the manifest is written last and names every file. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.training import CheckpointManifest

MANIFEST_NAME = "manifest.json"
_FOLDER = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, kw_only=True)
class CheckpointFound:
    """A whole checkpoint. Units: completed_at epoch seconds."""

    path: Path
    step: int
    completed_at: float


def load_manifest(folder: Path) -> CheckpointManifest:
    """The checkpoint's manifest.json. Raises: ValueError with what is wrong with it; OSError."""
    try:
        manifest = CheckpointManifest.read(folder / MANIFEST_NAME)
    except FileNotFoundError as error:
        raise ValueError(f"{MANIFEST_NAME}: not there, so it was not written to its end") from error
    except ValueError as error:
        raise ValueError(f"{MANIFEST_NAME}: not readable ({type(error).__name__}: {error})") from error
    if folder.name != f"checkpoint-{manifest.step}":
        raise ValueError(f"{MANIFEST_NAME}: its step is {manifest.step}")
    return manifest


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Every checkpoint-<step>, whole or not, the highest step first."""
    folders = [path for path in checkpoints.glob("checkpoint-*") if _FOLDER.fullmatch(path.name)]
    return sorted(folders, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step in the folder's name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def is_complete(folder: Path) -> bool:
    """True where the manifest and every file it names are there with the size they had. Nothing is hashed."""
    try:
        files = load_manifest(folder).files
        return all((folder / name).stat().st_size == file.bytes for name, file in files.items())
    except (OSError, ValueError):
        return False


def find_newest_complete(checkpoints: Path) -> Path | None:
    """The checkpoint with the highest step among those whose files have their sizes, or None."""
    return next((folder for folder in list_checkpoints(checkpoints) if is_complete(folder)), None)


def find_newest_checkpoint(run: RunDir) -> CheckpointFound | None:
    """The run's newest whole checkpoint, by sizes. Hashes are the resuming attempt's work, and may take minutes."""
    try:
        folder = find_newest_complete(run.checkpoints)
        if folder is None:
            return None
        completed_at = (folder / MANIFEST_NAME).stat().st_mtime
    except OSError:
        return None
    return CheckpointFound(path=folder, step=step_of(folder), completed_at=completed_at)
