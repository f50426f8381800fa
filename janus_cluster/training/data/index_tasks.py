"""What a process that reads data sets is asked, and how it answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from janus_cluster.training.data.formats.registry import FORMATS
from janus_cluster.training.data.formats.source import Source, digest, folder_stamps
from janus_cluster.training.data.store import Collector, Columns
from janus_cluster.training.data.table import Indices
from janus_cluster.training.data.text_counts import CountTask, run_count_task


class ReadTask(NamedTuple):
    """Read these units."""

    source: Source
    units: Sequence[Any]


class StampTask(NamedTuple):
    """Hash the names, sizes and times of change of all files in these folders."""

    root: Path
    names: Sequence[str]


Task = ReadTask | StampTask | CountTask


def run_task(task: Task) -> Columns | str | Indices:
    """The columns of a ReadTask, the hash of a StampTask, the counts of a CountTask."""
    if isinstance(task, CountTask):
        return run_count_task(task)
    if isinstance(task, StampTask):
        return digest(line for name in task.names for line in (name, *folder_stamps(task.root / name)))
    collector = Collector(decode_images=task.source.decode_images)
    reader = FORMATS[task.source.format]
    for unit in task.units:
        reader.read_unit(task.source, unit, collector)
    return collector.columns()
