"""Which checkpoints of a run folder are whole, and which one training goes on from.

The Trainer and DeepSpeed write checkpoint-<step>/; its manifest comes last, so a folder without one is not whole.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch.distributed as dist

from janus_cluster.errors import UsageError
from janus_cluster.rundir import read_json, write_json_atomically
from janus_cluster.training.world import World

MANIFEST_NAME = "manifest.json"
_FOLDER_PATTERN = re.compile(r"checkpoint-(\d+)")


def clear_checkpoint(checkpoints: Path, *, step: int, world: World) -> None:
    """No checkpoint-<step> is there: what an attempt that died half-way left would be mixed into the new one."""
    if world.is_main:
        _remove(checkpoints / f"checkpoint-{step}")
    _wait_for_all()


def complete_checkpoint(checkpoints: Path, *, step: int, world: World, keep_last: int) -> None:
    """checkpoint-<step> is whole and known to be; of the older ones, only the newest `keep_last - 1` are left.

    Every rank calls this after it has written its part.
    """
    _wait_for_all()
    if world.is_main:
        write_manifest(checkpoints / f"checkpoint-{step}", step=step, world_size=world.world_size)
        remove_old(checkpoints, keep_last=keep_last)
    _wait_for_all()


def write_manifest(folder: Path, *, step: int, world_size: int) -> None:
    """`folder` holds manifest.json with the size in bytes of every file that was there before."""
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_NAME
    }
    manifest = {"schema_version": 1, "step": step, "world_size": world_size, "files_bytes": files}
    write_json_atomically(folder / MANIFEST_NAME, manifest)


def is_complete(folder: Path) -> bool:
    """True where the manifest and every file it names are there with the size they had."""
    try:
        files = read_json(folder / MANIFEST_NAME)["files_bytes"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def find_newest_complete(checkpoints: Path) -> Path | None:
    """The whole checkpoint with the highest step, or None. Half-written ones are passed over."""
    return next((folder for folder in _newest_first(checkpoints) if is_complete(folder)), None)


def agree_on_resume(checkpoints: Path, *, resume: str, world: World) -> Path | None:
    """The checkpoint that every rank goes on from (rank 0 decides, so that a lagging file system cannot split them).

    Raises: UsageError on every rank if another number of processes wrote it.
    """
    folder = find_newest_complete(checkpoints) if world.is_main and resume == "auto" else None
    found = [(folder, None if folder is None else int(read_json(folder / MANIFEST_NAME)["world_size"]))]
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    folder, wrote = found[0]
    if folder is not None and wrote != world.world_size:
        raise UsageError(
            f"{folder} was written by {wrote} processes, this attempt has {world.world_size}: each goes on from "
            "its own part of the optimizer's state",
            hint=f"start it on {wrote} processes again (nodes × hardware.processes_per_node, as in the run folder's "
            "job.yaml); or submit a new run with --set checkpoint.resume=never, which begins at step 0",
        )
    return folder


def remove_old(checkpoints: Path, *, keep_last: int) -> None:
    """The newest `keep_last` whole checkpoints are left, and nothing older than the newest of them that is broken."""
    whole = [folder for folder in _newest_first(checkpoints) if is_complete(folder)]
    for folder in _newest_first(checkpoints):
        is_stale = whole and _step(folder) < _step(whole[0])
        if is_stale and folder not in whole[:keep_last]:
            _remove(folder)


def _newest_first(checkpoints: Path) -> list[Path]:
    folders = [path for path in checkpoints.glob("checkpoint-*") if _FOLDER_PATTERN.fullmatch(path.name)]
    return sorted(folders, key=_step, reverse=True)


def _remove(folder: Path) -> None:
    """The manifest goes first: without it a half-deleted folder cannot be taken for a whole one."""
    if folder.exists():
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        shutil.rmtree(folder)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def _wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()
