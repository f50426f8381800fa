"""One process that reads units of data sets: python -m janus_cluster.training.data.index_worker

Pickled tasks come in on stdin, pickled results go out on stdout. It is a process of its own rather than a fork, because
the trainer's process holds torch, threads and a device; this one holds neither and starts in a fraction of a second.
"""

from __future__ import annotations

import os
import pickle
import sys
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


def main() -> None:
    """Tasks are worked off until stdin ends."""
    # Whatever a library prints must not get among the results.
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            task = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(run_task(task), results, protocol=pickle.HIGHEST_PROTOCOL)
        results.flush()


if __name__ == "__main__":
    main()
