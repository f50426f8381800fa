"""Find the whole checkpoints of a run folder, and the one that training resumes from.

training/saving.py writes them. The manifest is written last, so a folder without one is not whole.
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
from typing import Any

from janus_cluster.errors import TrainingFailed
from janus_cluster.run.checkpoints import (
    MANIFEST_NAME,
    is_complete,
    list_checkpoints,
    load_manifest,
    step_of,
)
from janus_cluster.run.records.training import CheckpointFile, CheckpointManifest
from janus_cluster.training.world import World, from_main, gather, group_size

# sha256 of a file makes 1.3-1.4 GB per second of one core with SHA instructions, for pieces of any size.
_PIECE_BYTES = 1 << 20
_BROKEN_PATTERN = re.compile(r"checkpoint-(\d+)\.broken(?:-\d+)?")


@dataclass(frozen=True, kw_only=True)
class PassedOver:
    """A checkpoint that cannot be used: its present folder, and what is wrong with it."""

    step: int
    path: Path
    reason: str


@dataclass(frozen=True, kw_only=True)
class Resume:
    """The checkpoint that training resumes from (None: it begins at step 0), and the newer damaged ones."""

    checkpoint: Path | None
    passed_over: tuple[PassedOver, ...] = ()


def write_manifest(
    folder: Path,
    *,
    step: int,
    world_size: int,
    files: Mapping[str, CheckpointFile] | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write manifest.json into `folder`, with size and sha256 of every file that was there before.

    files: where they are known already. about: further entries of the manifest.
    """
    if files is None:
        files = {name: describe(folder / name) for name in list_sizes(folder)}
    CheckpointManifest(
        step=step, world_size=world_size, written_at=time.time(), files=dict(sorted(files.items())), **(about or {})
    ).write(folder / MANIFEST_NAME)


def list_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below `folder` by its relative name, the manifest left out."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST_NAME
    }


def describe(path: Path) -> CheckpointFile:
    """The file's size and sha256 as they are now."""
    with path.open("rb", buffering=0) as f:
        num_bytes = os.fstat(f.fileno()).st_size
        # hashlib.file_digest is new in Python 3.11.
        digest, piece = hashlib.sha256(), memoryview(bytearray(_PIECE_BYTES))
        while num_read := f.readinto(piece):
            digest.update(piece[:num_read])
    return CheckpointFile(bytes=num_bytes, sha256=digest.hexdigest())


def share_out(sizes: Mapping[str, int], num_ranks: int) -> list[list[str]]:
    """Each rank's files, so that all ranks have about as many bytes to read."""
    shares: list[list[str]] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = load.index(min(load))
        shares[rank].append(name)
        load[rank] += sizes[name]
    return shares


def agree_on_resume(checkpoints: Path, *, resume: str, world: World, report: Callable[[str], None] = print) -> Resume:
    """The checkpoint that every rank resumes from: the newest whose every file is as it was written.

    The ranks share the reading. A damaged one is reported and its folder renamed. Any world size may have written it:
    the
    Trainer reshards the state where it must.
    Raises: TrainingFailed if ranks see different files; OSError where a fault of another kind keeps them from reading.
    """
    passed_over: list[PassedOver] = []
    for folder in from_main(world, lambda: list_checkpoints(checkpoints) if resume == "auto" else []):
        manifest, reason = from_main(world, partial(_load_or_reason, folder))
        if manifest is not None:
            reason = _find_damage(folder, manifest, world)
        if manifest is not None and reason is None:
            return Resume(checkpoint=folder, passed_over=tuple(passed_over))
        aside = from_main(world, partial(_set_aside, folder))
        passed_over.append(PassedOver(step=step_of(folder), path=aside, reason=str(reason)))
        report(f"{folder} is damaged ({reason}); set aside as {aside.name}")
    if passed_over:
        report(f"no checkpoint in {checkpoints} is whole: training begins at step 0")
    return Resume(checkpoint=None, passed_over=tuple(passed_over))


def _load_or_reason(folder: Path) -> tuple[CheckpointManifest | None, str | None]:
    try:
        return load_manifest(folder), None
    except ValueError as error:
        return None, str(error)


def _find_damage(folder: Path, manifest: CheckpointManifest, world: World) -> str | None:
    """What is wrong with one of the files, the same text on every rank; None if all are as they were written.

    Rank 0 looks at it again: a node whose view of the file system lags must not cost a whole checkpoint.
    """
    shares = share_out({name: file.bytes for name, file in manifest.files.items()}, group_size())
    found = gather(_first_damaged(folder, shares[world.rank if group_size() > 1 else 0], manifest))
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


def _first_damaged(folder: Path, names: Iterable[str], manifest: CheckpointManifest) -> tuple[str, str] | None:
    for name in names:
        if (reason := _damage_of(folder / name, manifest.files[name])) is not None:
            return name, reason
    return None


def _damage_of(path: Path, written: CheckpointFile) -> str | None:
    """How the file differs from what was written. Raises: OSError for a fault that is not the file's own."""
    try:
        num_bytes = path.stat().st_size
        if num_bytes != written.bytes:
            return f"{num_bytes} bytes, {written.bytes} were written"
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
    """Keep the newest `keep_last` whole checkpoints, the one just written, and those of every `keep_every` steps.

    Broken ones that are not newer than the newest whole one are removed.
    """
    whole = [folder for folder in list_checkpoints(checkpoints) if is_complete(folder)]
    if not whole:
        return
    kept = {step_of(folder) for folder in whole[:keep_last]} | {just_written}
    if keep_every is not None:
        kept |= {step_of(folder) for folder in whole if step_of(folder) % keep_every == 0}
    newest = step_of(whole[0])
    stale = [
        f for f in list_checkpoints(checkpoints) if step_of(f) < newest and not (f in whole and step_of(f) in kept)
    ]
    broken = [p for p in checkpoints.iterdir() if (m := _BROKEN_PATTERN.fullmatch(p.name)) and int(m[1]) <= newest]
    for folder in stale + broken:
        try:
            _remove(folder)
        except OSError as error:
            # A run must not end because something old could not be deleted; the next save tries again.
            report(f"{folder} could not be removed: {error}")


def _remove(folder: Path) -> None:
    """The manifest goes first: without it a half-deleted folder cannot be taken for a whole one."""
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder)
