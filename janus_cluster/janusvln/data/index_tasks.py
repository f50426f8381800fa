"""What a process that reads data sets is given to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from janus_cluster.janusvln.data.formats.registry import FORMATS
from janus_cluster.janusvln.data.formats.source import Source, digest, folder_stamps
from janus_cluster.janusvln.data.store import Collector, Columns


def read_units(source: Source, units: Sequence[Any]) -> Columns:
    """The columns of these units."""
    collector = Collector(decode_images=source.decode_images)
    reader = FORMATS[source.format]
    for unit in units:
        reader.read_unit(source, unit, collector)
    return collector.columns()


def stamp_folders(root: Path, names: Sequence[str]) -> str:
    """A hash of the names, sizes and times of change of all files in these folders."""
    return digest(line for name in names for line in (name, *folder_stamps(root / name)))
