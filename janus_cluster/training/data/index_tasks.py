"""What a process that reads data sets is asked, and how it answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from janus_cluster.training.data.formats.registry import FORMATS
from janus_cluster.training.data.formats.source import Source, digest, folder_stamps
from janus_cluster.training.data.store import Collector, Columns


class ReadTask(NamedTuple):
    """Read these units."""

    source: Source
    units: Sequence[Any]


class StampTask(NamedTuple):
    """Hash the names, sizes and times of change of all files in these folders."""

    root: Path
    names: Sequence[str]


def run_task(task: ReadTask | StampTask) -> Columns | str:
    """The columns of a ReadTask, the hash of a StampTask."""
    if isinstance(task, StampTask):
        return digest(line for name in task.names for line in (name, *folder_stamps(task.root / name)))
    collector = Collector(decode_images=task.source.decode_images)
    reader = FORMATS[task.source.format]
    for unit in task.units:
        reader.read_unit(task.source, unit, collector)
    return collector.columns()
