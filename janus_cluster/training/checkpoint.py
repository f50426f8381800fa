"""Which checkpoints of a run folder are whole, and which one training goes on from.

training/saving.py writes them. The manifest comes last, so a folder without one is not whole.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from janus_cluster.errors import TrainingFailed
from janus_cluster.rundir import read_json, write_json_atomically
from janus_cluster.training.world import World

MANIFEST_NAME = "manifest.json"
T = TypeVar("T")
# sha256 of a file makes 1.3-1.4 GB per second of one core with SHA instructions, whatever the size of the pieces.
_PIECE_BYTES = 1 << 20
_FOLDER_PATTERN = re.compile(r"checkpoint-(\d+)")
_BROKEN_PATTERN = re.compile(r"checkpoint-(\d+)\.broken(?:-\d+)?")


class Described(NamedTuple):
    """A file as it was written. sha256 is None in the manifests that held sizes alone."""

    num_bytes: int
    sha256: str | None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint says about itself."""

    step: int
    world_size: int
    files: Mapping[str, Described]

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files.values())


@dataclass(frozen=True, kw_only=True)
class PassedOver:
    """A checkpoint that cannot be used: where it lies now, and what is wrong with it."""

    step: int
    path: Path
    reason: str


@dataclass(frozen=True, kw_only=True)
class Resume:
    """What training goes on from (None: it begins at step 0), and the newer ones that are damaged."""

    checkpoint: Path | None
    passed_over: tuple[PassedOver, ...] = ()


def write_manifest(
    folder: Path,
    *,
    step: int,
    world_size: int,
    files: Mapping[str, Described] | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """`folder` holds manifest.json with size and sha256 of every file that was there before.

    files: where they are known already. about: what else the manifest says.
    """
    if files is None:
        files = {name: describe(folder / name) for name in list_sizes(folder)}
    manifest = {
        "schema_version": 2,
        "step": step,
        "world_size": world_size,
        "written_at": time.time(),
        **(about or {}),
        "files": {name: {"bytes": file.num_bytes, "sha256": file.sha256} for name, file in sorted(files.items())},
    }
    write_json_atomically(folder / MANIFEST_NAME, manifest)


def load_manifest(folder: Path) -> Manifest:
    """What manifest.json says. Raises: ValueError with what is wrong with it; OSError."""
    try:
        found = read_json(folder / MANIFEST_NAME)
        version = found.get("schema_version", 1)
        if version == 1:
            files = {str(name): Described(int(size), None) for name, size in found["files_bytes"].items()}
        elif version == 2:
            files = {
                str(name): Described(int(file["bytes"]), str(file["sha256"])) for name, file in found["files"].items()
            }
        else:
            raise ValueError(f"schema_version {version!r}, this version reads 1 and 2")
        manifest = Manifest(step=int(found["step"]), world_size=int(found["world_size"]), files=files)
    except FileNotFoundError as error:
        raise ValueError(f"{MANIFEST_NAME}: not there, so it was not written to its end") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST_NAME}: not readable ({type(error).__name__}: {error})") from error
    if folder.name != f"checkpoint-{manifest.step}":
        raise ValueError(f"{MANIFEST_NAME}: it speaks of step {manifest.step}")
    return manifest


def list_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below `folder` by its relative name, the manifest left out."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST_NAME
    }


def describe(path: Path) -> Described:
    """The file's size and sha256 as they are now."""
    with path.open("rb", buffering=0) as f:
        num_bytes = os.fstat(f.fileno()).st_size
        # hashlib.file_digest came with Python 3.11.
        digest, piece = hashlib.sha256(), memoryview(bytearray(_PIECE_BYTES))
        while num_read := f.readinto(piece):
            digest.update(piece[:num_read])
    return Described(num_bytes, digest.hexdigest())


def share_out(sizes: Mapping[str, int], num_ranks: int) -> list[list[str]]:
    """Each rank's files, so that all ranks have about as many bytes to read."""
    shares: list[list[str]] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = load.index(min(load))
        shares[rank].append(name)
        load[rank] += sizes[name]
    return shares


def is_complete(folder: Path) -> bool:
    """True where the manifest and every file it names are there with the size they had. Nothing is hashed."""
    try:
        files = load_manifest(folder).files
        return all((folder / name).stat().st_size == file.num_bytes for name, file in files.items())
    except (OSError, ValueError):
        return False


def find_newest_complete(checkpoints: Path) -> Path | None:
    """The checkpoint with the highest step among those whose files have their sizes, or None."""
    return next((folder for folder in _newest_first(checkpoints) if is_complete(folder)), None)


def agree_on_resume(checkpoints: Path, *, resume: str, world: World, report: Callable[[str], None] = print) -> Resume:
    """What every rank goes on from: the newest checkpoint whose every file is as it was written.

    The ranks share out the reading. A damaged one is said aloud and keeps its files under another name. Who wrote it
    does not matter here: the Trainer cuts the state anew where it must.
    Raises: TrainingFailed if ranks see different files; OSError where a fault of another kind keeps them from reading.
    """
    passed_over: list[PassedOver] = []
    for folder in from_main(world, lambda: _newest_first(checkpoints) if resume == "auto" else []):
        manifest, reason = from_main(world, partial(_load_or_reason, folder))
        if manifest is not None:
            reason = _find_damage(folder, manifest, world)
        if manifest is not None and reason is None:
            return Resume(checkpoint=folder, passed_over=tuple(passed_over))
        aside = from_main(world, partial(_set_aside, folder))
        passed_over.append(PassedOver(step=_step(folder), path=aside, reason=str(reason)))
        report(f"{folder} is damaged ({reason}); set aside as {aside.name}")
    if passed_over:
        report(f"no checkpoint in {checkpoints} is whole: training begins at step 0")
    return Resume(checkpoint=None, passed_over=tuple(passed_over))


def _load_or_reason(folder: Path) -> tuple[Manifest | None, str | None]:
    try:
        return load_manifest(folder), None
    except ValueError as error:
        return None, str(error)


def _find_damage(folder: Path, manifest: Manifest, world: World) -> str | None:
    """What is wrong with one of the files, the same words on every rank; None if all are as they were written.

    Rank 0 looks at it again: a node whose view of the file system lags must not cost a whole checkpoint.
    """
    shares = share_out({name: file.num_bytes for name, file in manifest.files.items()}, group_size())
    found = gather(_first_damaged(folder, shares[world.rank if dist.is_initialized() else 0], manifest))
    rank, damage = next(((rank, damage) for rank, damage in enumerate(found) if damage), (0, None))
    if damage is None:
        return None
    name, reason = damage
    if rank and from_main(world, partial(_damage_of, folder / name, manifest.files[name])) is None:
        raise TrainingFailed(
            f"{folder / name}: rank {rank} finds {reason}; rank 0 finds it whole",
            hint="the file system of that rank's node lags or its memory is bad; resume once more, without that node "
            "if it comes again. Nothing was changed",
        )
    return f"{name}: {reason}"


def _first_damaged(folder: Path, names: Iterable[str], manifest: Manifest) -> tuple[str, str] | None:
    for name in names:
        if (reason := _damage_of(folder / name, manifest.files[name])) is not None:
            return name, reason
    return None


def _damage_of(path: Path, written: Described) -> str | None:
    """How the file differs from what was written. Raises: OSError for a fault that is not the file's own."""
    try:
        num_bytes = path.stat().st_size
        if num_bytes != written.num_bytes:
            return f"{num_bytes} bytes, {written.num_bytes} were written"
        if written.sha256 is None:
            return None
        sha256 = describe(path).sha256
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return "not there"
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return str(error.strerror)
    return None if sha256 == written.sha256 else f"sha256 {sha256}, {written.sha256} was written"


def _set_aside(folder: Path) -> Path:
    """Its new path. Nothing is deleted before there is something newer that is good; see remove_old."""
    names = itertools.chain([".broken"], (f".broken-{n}" for n in itertools.count(2)))
    aside = next(p for name in names if not (p := folder.with_name(folder.name + name)).exists())
    folder.rename(aside)
    return aside


def remove_old(
    checkpoints: Path,
    *,
    keep_last: int,
    keep_every: int | None = None,
    just_written: int | None = None,
    report: Callable[[str], None] = print,
) -> None:
    """The newest `keep_last` whole checkpoints are left, the one just written, and those of every `keep_every` steps.

    What is broken and not newer than the newest whole one is gone.
    """
    whole = [folder for folder in _newest_first(checkpoints) if is_complete(folder)]
    if not whole:
        return
    kept = {_step(folder) for folder in whole[:keep_last]} | {just_written}
    if keep_every is not None:
        kept |= {_step(folder) for folder in whole if _step(folder) % keep_every == 0}
    newest = _step(whole[0])
    stale = [f for f in _newest_first(checkpoints) if _step(f) < newest and not (f in whole and _step(f) in kept)]
    broken = [p for p in checkpoints.iterdir() if (m := _BROKEN_PATTERN.fullmatch(p.name)) and int(m[1]) <= newest]
    for folder in stale + broken:
        try:
            _remove(folder)
        except OSError as error:
            # A run must not end because something old could not be deleted; the next save tries again.
            report(f"{folder} could not be removed: {error}")


def _newest_first(checkpoints: Path) -> list[Path]:
    folders = [path for path in checkpoints.glob("checkpoint-*") if _FOLDER_PATTERN.fullmatch(path.name)]
    return sorted(folders, key=_step, reverse=True)


def _remove(folder: Path) -> None:
    """The manifest goes first: without it a half-deleted folder cannot be taken for a whole one."""
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def from_main(world: World, make: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank."""
    made: list[Any] = [make() if world.is_main else None]
    if dist.is_initialized():
        dist.broadcast_object_list(made, src=0)
    found: T = made[0]
    return found


def gather(own: T) -> list[T]:
    """Every rank's value, in the order of the ranks, on every rank."""
    if not dist.is_initialized():
        return [own]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def group_size() -> int:
    """How many ranks there are to share work with."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all() -> None:
    """Every rank has come here."""
    if dist.is_initialized():
        dist.barrier()
