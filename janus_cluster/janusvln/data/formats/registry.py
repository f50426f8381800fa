"""Find the format of a path."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from janus_cluster.errors import UsageError
from janus_cluster.janusvln.data.formats.episodes import MILESTONES_NAME, EpisodeFolders
from janus_cluster.janusvln.data.formats.layout import RECORD_SUFFIXES, require_episodes
from janus_cluster.janusvln.data.formats.records import RecordFile
from janus_cluster.janusvln.data.formats.source import Format, Source
from janus_cluster.job.schema import Data, Root

FORMATS: dict[str, Format] = {
    "episodes": EpisodeFolders(),
    "json": RecordFile(),
    "annotation": RecordFile(),
    "trajectories": RecordFile(),
    "auto": RecordFile(),
}
SAMPLED_NAME = re.compile(r"(.+)%(\d{1,3})", re.ASCII)
# The files that make a folder a data set of records, in this order.
RECORD_FILES = ("annotations.json", "train.json.gz", "train_guide.json.gz", "train.json")


def resolve_sources(data: Data) -> list[Source]:
    """Every root of the job file. Raises: UsageError."""
    return [resolve_source(root, data) for root in data.roots]


def resolve_source(root: Root, data: Data) -> Source:
    """The root of the job file with its format decided; files of records keep `auto`, their records decide.

    Raises: UsageError if nothing of a known format is there.
    """
    path = Path(root.path)
    if not path.exists():
        raise _absent_root(path)
    images = None if root.images is None else Path(root.images)
    if images is not None and not images.is_dir():
        raise UsageError(f"data.roots: images of {path}: {images} is not a folder")
    kind = root.format
    source = Source(
        path=path,
        format="episodes",
        decode_images=data.verify_images == "decode",
        actions={**data.actions, **root.actions},
    )
    if path.is_dir():
        record_file = next((path / name for name in RECORD_FILES if (path / name).is_file()), None)
        if kind == "episodes" or record_file is None:
            if not (path / MILESTONES_NAME).is_file():
                require_episodes(path)
            _refuse_kind(path, kind, allowed=("auto", "episodes"), found=f"no {', '.join(RECORD_FILES)} in it")
            return source
        path = record_file
    elif not path.name.endswith(RECORD_SUFFIXES):
        raise UsageError(f"data.roots: {path} is no folder and no {', '.join(RECORD_SUFFIXES)} file")
    _refuse_kind(path, kind, allowed=("auto", "json", "annotation", "trajectories"), found="it is a file of records")
    return replace(source, path=path, format=kind, images=images, image_roots={**data.image_roots, **root.image_roots})


def _absent_root(path: Path) -> UsageError:
    hint = "data.roots names folders or files; see docs/data.md"
    if sampled := SAMPLED_NAME.fullmatch(str(path)):
        # As upstream's lists of data sets have it.
        hint = f"a part of a data set is {{path: {sampled[1]}, fraction: {int(sampled[2]) / 100:g}}}"
    return UsageError(f"data.roots: {path} does not exist", hint=hint)


def _refuse_kind(path: Path, kind: str, *, allowed: tuple[str, ...], found: str) -> None:
    if kind not in allowed:
        raise UsageError(
            f"data.roots: {path} cannot be of format {kind}: {found}", hint="leave format out, or see docs/data.md"
        )
