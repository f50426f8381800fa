"""The index of each root, read by several processes once and kept until the data changes."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from janus_cluster.errors import JanusError, UsageError
from janus_cluster.janusvln.data.formats.registry import FORMATS
from janus_cluster.janusvln.data.formats.source import Source, digest, file_stamp
from janus_cluster.janusvln.data.index_tasks import read_units, stamp_folders
from janus_cluster.janusvln.data.old_indexes import UNUSED_DAYS, mark_used, remove_old_indexes
from janus_cluster.janusvln.data.pool import run_tasks
from janus_cluster.janusvln.data.store import Columns, Store, load_store, write_store

INDEX_VERSION = 5  # raised where an index holds something else for the same data
UNITS_PER_TASK = 256
# A process more takes 0.4 s to start; about 500 episodes are read in that time.
UNITS_PER_PROCESS = 1_000
MAX_PROCESSES = 32
REPORT_EVERY_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Reporter:
    """`report` receives lines of text, `progress` the share of a root that is read (else a line now and then)."""

    report: Callable[[str], None] = lambda _: None
    progress: Callable[[str, float], None] | None = None


@dataclass(frozen=True)
class Share:
    """How the ranks agree: one builds, `broadcast` gives its value to all (it is called on every rank)."""

    is_builder: bool
    broadcast: Callable[[Any], Any]


def load_stores(
    sources: Sequence[Source], *, index_dir: Path | None, share: Share | None, reporter: Reporter
) -> list[Store]:
    """The index of every root, from `index_dir` where it is there and the data has not changed since, else read anew.

    Without `index_dir` everything is read and nothing is kept. With `share` only the builder reads, and a failure of
    it is raised on every rank.
    Raises: UsageError.
    """
    if index_dir is None:
        return [_read_source(source, reporter) for source in sources]
    outcome: Any = None
    if share is None or share.is_builder:
        try:
            outcome = [str(_refresh(source, index_dir, reporter)) for source in sources]
            for folder in outcome:
                mark_used(Path(folder))
            for folder in remove_old_indexes(index_dir):
                reporter.report(f"{folder} was not used for {UNUSED_DAYS} days: removed")
        except JanusError as error:
            outcome = error
        except OSError as error:
            outcome = UsageError(
                f"the data cannot be indexed: {error}", hint="data.index_dir needs a folder to write in"
            )
    if share is not None:
        outcome = share.broadcast(outcome)
    if isinstance(outcome, JanusError):
        raise outcome
    return [_open_store(Path(folder)) for folder in outcome]


def _open_store(folder: Path) -> Store:
    try:
        return load_store(folder)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the index of the data is not readable here: {folder} ({error})",
            hint="set data.index_dir to a folder that all nodes share",
        ) from error


def _refresh(source: Source, index_dir: Path, reporter: Reporter) -> Path:
    """The folder of a valid index of the source, written now if need be."""
    begun = time.monotonic()
    tables = (sorted(source.image_roots.items()), sorted(source.actions.items()))
    key = digest([str(INDEX_VERSION), *map(repr, (source.path.resolve(), source.format, source.images, *tables))])[:16]
    key += "-decoded" if source.decode_images else ""
    before = _stamp_before(source)
    for folder in _newest_first(index_dir.glob(f"{key}-*")):
        store = _try_load(folder)
        if store is None:
            shutil.rmtree(folder, ignore_errors=True)
        elif folder.name == f"{key}-{_stamp_after(before, store.watched(), source)}":
            reporter.report(f"{source.path}: {len(store):,} samples, index checked in {time.monotonic() - begun:.1f} s")
            return folder
    index_dir.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=index_dir, prefix=".building-"))
    try:
        watched = write_store(_read_parts(source, reporter), building).watched()
        folder = index_dir / f"{key}-{_stamp_after(before, watched, source)}"
        _publish(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _publish(building: Path, folder: Path) -> None:
    """The folder is there; one that another process wrote meanwhile is as good."""
    try:
        building.rename(folder)
    except OSError:
        if _try_load(folder) is None:
            raise


def _newest_first(folders: Iterator[Path]) -> list[Path]:
    changed_ns: dict[Path, int] = {}
    for folder in folders:
        with suppress(OSError):  # another job removed it meanwhile
            changed_ns[folder] = folder.stat().st_mtime_ns
    return sorted(changed_ns, key=lambda folder: changed_ns[folder], reverse=True)


def _try_load(folder: Path) -> Store | None:
    """Raises: OSError where the file system fails. That is no damage: another job may have the index mapped."""
    try:
        return load_store(folder)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, KeyError, TypeError):
        return None  # damaged: it is removed and made anew


def _stamp_before(source: Source) -> str:
    """What the data set looks like before it is read: every file of the episodes, or the file of records."""
    if source.format != "episodes":
        return file_stamp(source.path)
    names = list(FORMATS[source.format].list_units(source))
    starts = range(0, len(names), UNITS_PER_TASK)
    tasks = [partial(stamp_folders, source.path, names[i : i + UNITS_PER_TASK]) for i in starts]
    # A stat takes a hundredth of what reading takes: more processes than these would only wait for each other.
    processes = num_processes(len(names) // 10)
    return digest(run_tasks(tasks, processes))


def _stamp_after(before: str, watched: Sequence[str], source: Source) -> str:
    folders = [] if source.format == "episodes" else watched
    return digest([before, *(f"{folder}:{file_stamp(Path(folder))}" for folder in folders)])[:16]


def _read_source(source: Source, reporter: Reporter) -> Store:
    """An index that nothing keeps: its columns are in memory."""
    with tempfile.TemporaryDirectory(prefix="janus-index-") as name:
        return write_store(_read_parts(source, reporter), Path(name)).in_memory()


def _read_parts(source: Source, reporter: Reporter) -> Iterator[Columns]:
    """Everything in the data set, a part after the other. Raises: UsageError if it cannot be read at all."""
    begun = last_report_s = time.monotonic()
    units = FORMATS[source.format].list_units(source)
    what = "episodes" if source.format == "episodes" else "records"
    stream = iter(units)
    # The number of a file's records is unknown before its end.
    first = list(islice(stream, 2 * UNITS_PER_PROCESS))
    processes = num_processes(int(len(first) / max(units.share_read(), 1e-9)))
    num_units = num_samples = 0

    def tasks() -> Iterator[Callable[[], Columns]]:
        nonlocal num_units
        everything = chain(first, stream)
        while part := list(islice(everything, UNITS_PER_TASK)):
            num_units += len(part)
            yield partial(read_units, source, part)

    for result in run_tasks(tasks(), processes):
        yield result
        num_samples += len(result.arrays["sample_id"])
        if reporter.progress is not None:
            reporter.progress(f"{source.path.name}: {num_units:,} {what}", units.share_read())
        elif time.monotonic() - last_report_s > REPORT_EVERY_S:
            last_report_s = time.monotonic()
            reporter.report(f"{source.path}: {num_units:,} {what} read ({units.share_read():.0%})")
    reporter.report(
        f"{source.path}: {num_samples:,} samples of {num_units:,} {what} read "
        f"in {time.monotonic() - begun:.1f} s by {processes} process{'es' if processes > 1 else ''}"
    )


def num_processes(num_units: int) -> int:
    """How many processes it pays to start for so many units of work; at most one a core."""
    return max(1, min(len(os.sched_getaffinity(0)), MAX_PROCESSES, num_units // UNITS_PER_PROCESS))
