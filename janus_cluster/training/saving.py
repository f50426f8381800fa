"""Write a checkpoint: to a folder aside, synced, hashed, described, and only then renamed.

An error before the rename leaves the older checkpoints unchanged. Folders aside of dead attempts are removed at the
next save.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from janus_cluster.errors import TrainingFailed
from janus_cluster.run.checkpoints import find_newest_complete, load_manifest
from janus_cluster.run.next_command import command_for
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.training import CheckpointFile
from janus_cluster.training.checkpoint import describe, list_sizes, remove_old, share_out, write_manifest
from janus_cluster.training.world import World, from_main, gather, group_size, wait_for_all

PARTIAL_NAME = ".partial"
_FULL = {errno.ENOSPC: "No space left on device", errno.EDQUOT: "Disk quota exceeded"}
# torch's writer and safetensors' report a failed write without the system's error number.
_WRITER_FAILED = re.compile(r"PytorchStreamWriter failed|inline_container\.cc.*unexpected pos|file write failed")
_PROBE_BYTES = 4 << 20


@contextlib.contextmanager
def new_checkpoint(
    checkpoints: Path,
    *,
    step: int,
    world: World,
    keep_last: int,
    keep_every: int | None = None,
    about: Mapping[str, Any] | None = None,
    beat: Callable[[], None] = lambda: None,
) -> Iterator[Path]:
    """The folder in which every rank writes its part of checkpoint-<step>/; after the block that checkpoint is whole.

    Old ones are removed then by `remove_old`. about: entries of the manifest besides the files.
    Raises: TrainingFailed where the disk has no room: before the block on all ranks if that is known, otherwise on the
    rank that met it, after removing what this save had written.
    """
    name = f"checkpoint-{step}"
    refusal, aside = from_main(world, lambda: _make_room(checkpoints, name))
    if refusal is not None:
        raise _disk_full(checkpoints, refusal)
    try:
        yield aside
        _seal(aside / name, step=step, world=world, about=about, beat=beat)
    except Exception as error:
        if (explained := _explain(error, checkpoints, aside, name)) is None:
            raise
        raise explained from error
    if world.is_main:
        _publish(aside / name, checkpoints / name)
        remove_old(checkpoints, keep_last=keep_last, keep_every=keep_every, just_written=step)
    wait_for_all()


def warn_of_slow_save(took_s: float, *, limit_s: float) -> str | None:
    """What to type where a checkpoint takes half of the time that a stop has for one: a busy file system would lose it.

    Units: seconds, as restart.stop_timeout_s. None where there is time enough.
    """
    if took_s < limit_s / 2:
        return None
    wanted_s = 60 * math.ceil(4 * took_s / 60)
    return (
        f"this checkpoint took {took_s:.0f} s, and after a stop signal there are {limit_s:g} s for one; "
        f"the next resume gives it more with --set restart.stop_timeout_s={wanted_s} "
        f"--set slurm.signal=B:USR1@{wanted_s + 60}"
    )


def _make_room(checkpoints: Path, name: str) -> tuple[str | None, Path]:
    """(why it cannot fit, the folder for this save). Leftovers of dead attempts are removed.

    The folder's name is new each time: a process of an earlier attempt that still writes cannot mix its files in.
    """
    if not checkpoints.parent.is_dir():
        # Made anew, it would be a second run of that name, without the older checkpoints.
        raise TrainingFailed(
            f"the run folder {checkpoints.parent} is gone: {name} was not written",
            hint="was it moved? janus-cluster resume NEW_PATH",
            kind="file_system",
        )
    partial = checkpoints / PARTIAL_NAME
    # Not an error: NFS keeps what a process holds open that cannot be killed (.nfsXXXX), and a folder of its own is
    # enough for this save.
    shutil.rmtree(partial, ignore_errors=True)
    newest = find_newest_complete(checkpoints)
    free_bytes = _free_bytes(checkpoints)
    if newest is not None and (needed_bytes := load_manifest(newest).num_bytes) > free_bytes:
        why = f"{name} needs about {_size(needed_bytes)}, as {newest.name} did; {_size(free_bytes)} free"
        return f"{_FULL[errno.ENOSPC]}: {why} in {checkpoints}. Nothing was written", checkpoints
    try:
        partial.mkdir(parents=True, exist_ok=True)
        return None, Path(tempfile.mkdtemp(prefix=f"{name}-", dir=partial))
    except OSError as error:
        if error.errno not in _FULL:
            raise
        return f"{_FULL[error.errno]}: not even a folder for {name} could be made in {checkpoints}", checkpoints


def _seal(folder: Path, *, step: int, world: World, about: Mapping[str, Any] | None, beat: Callable[[], None]) -> None:
    """Sync every file and write the manifest of them last. Every rank calls this."""
    wait_for_all()
    sizes = from_main(world, lambda: list_sizes(folder))
    # On every node: only the one that wrote a file holds what is not yet on the disk.
    for name in sizes:
        _sync(folder / name)
        beat()
    own: dict[str, CheckpointFile] = {}
    for name in share_out(sizes, group_size())[world.rank if group_size() > 1 else 0]:
        own[name] = describe(folder / name)
        beat()
    files = {name: file for share in gather(own) for name, file in share.items()}
    changed = [name for name, file in files.items() if file.bytes != sizes[name]]
    if changed:
        raise TrainingFailed(
            f"{folder / changed[0]} had {sizes[changed[0]]} bytes, and another number when it was read"
        )
    if world.is_main:
        write_manifest(folder, step=step, world_size=world.world_size, files=files, about=about)
        for directory in {folder, *(path.parent for path in map(folder.joinpath, sizes))}:
            _sync(directory)


def _publish(folder: Path, final: Path) -> None:
    """Rename the new checkpoint to `final`. One of that name is removed only now."""
    aside = folder.parent
    if final.exists():
        final.rename(aside / "replaced")
    folder.rename(final)
    _sync(final.parent)
    shutil.rmtree(aside.parent, ignore_errors=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _explain(error: Exception, checkpoints: Path, aside: Path, name: str) -> TrainingFailed | None:
    """The error to raise in its place, or None.

    After a full disk, what this save had written is removed, so that there is room again.
    """
    if not aside.exists():
        # Not a cause of its own: a card must name the rank that met the full disk.
        return TrainingFailed(f"another rank gave up {name}; here: {type(error).__name__}: {error}", is_follow_up=True)
    full = _full_disk_message(error, aside)
    if full is None:
        return None
    free_bytes = _free_bytes(checkpoints)
    written_bytes = sum(list_sizes(aside).values())
    newest = find_newest_complete(checkpoints)
    if newest is None:
        needs = f"it needs more than the {_size(written_bytes)} that were written, {_size(free_bytes)} free"
    else:
        needs = (
            f"it needs about {_size(load_manifest(newest).num_bytes)}, as {newest.name} did, which is untouched; "
            f"{_size(written_bytes)} were written, {_size(free_bytes)} free"
        )
    # Out of the way first: then a rank that meets missing files knows why.
    given_up = aside.with_name(f"{aside.name}.given-up")
    with contextlib.suppress(OSError):
        aside.rename(given_up)
        shutil.rmtree(given_up, ignore_errors=True)
    return _disk_full(checkpoints, f"{full} while {name} was written in {checkpoints}: {needs}")


def _disk_full(checkpoints: Path, what: str) -> TrainingFailed:
    return TrainingFailed(
        what,
        hint=f"df -h {checkpoints}; make room there or keep fewer (--set checkpoint.keep_last=1), then "
        f"{command_for('resume', RunDir(checkpoints.parent))}",
        kind="disk_full",
    )


def _full_disk_message(error: BaseException, folder: Path) -> str | None:
    """The system's message where `error`, or a cause of it, is a full disk or quota; None for others."""
    has_writer_failed = False
    for seen in _chain(error):
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return _FULL[seen.errno]
        if found := next((message for message in _FULL.values() if message in str(seen)), None):
            return found
        has_writer_failed |= _WRITER_FAILED.search(str(seen)) is not None
    return _probe(folder) if has_writer_failed else None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """`error` and its causes."""
    met: list[BaseException] = []
    seen: BaseException | None = error
    while seen is not None and seen not in met:
        met.append(seen)
        yield seen
        seen = seen.__cause__ or seen.__context__


def _probe(folder: Path) -> str | None:
    """The system's message for a small write in `folder`, for libraries that do not report it."""
    path = folder / f".probe-{os.getpid()}"
    try:
        with path.open("wb", buffering=0) as f:
            f.write(b"\0" * _PROBE_BYTES)
            # A short write is no error yet: only the next one gives the reason.
            f.write(b"\0" * _PROBE_BYTES)
            os.fsync(f.fileno())
    except OSError as error:
        return _FULL.get(error.errno or 0)
    finally:
        path.unlink(missing_ok=True)
    return None


def _free_bytes(checkpoints: Path) -> int:
    existing = next(path for path in (checkpoints, *checkpoints.parents) if path.exists())
    return shutil.disk_usage(existing).free


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
