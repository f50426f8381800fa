"""The index of each root, read by several processes once and kept until the data changes."""

from __future__ import annotations

import os
import pickle
import queue
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from janus_cluster.errors import JanusError, TrainingFailed, UsageError
from janus_cluster.rundir import read_json
from janus_cluster.training.data.formats.registry import FORMATS
from janus_cluster.training.data.formats.source import Source, digest, file_stamp
from janus_cluster.training.data.index_tasks import ReadTask, StampTask, Task, run_task
from janus_cluster.training.data.old_indexes import UNUSED_DAYS, mark_used, remove_old_indexes
from janus_cluster.training.data.store import (
    Collector,
    Columns,
    Store,
    load_store,
    merge_columns,
    write_store,
)

INDEX_VERSION = 4  # raised where an index holds something else for the same data
UNITS_PER_TASK = 256
# A process more takes 0.4 s to start; about 500 episodes are read in that time.
UNITS_PER_PROCESS = 1_000
MAX_PROCESSES = 32
REPORT_EVERY_S = 5.0

Report = Callable[[str], None]


@dataclass(frozen=True)
class Share:
    """How the ranks agree: one builds, `broadcast` gives its value to all (it is called on every rank)."""

    is_builder: bool
    broadcast: Callable[[Any], Any]


def load_stores(
    sources: Sequence[Source], *, index_dir: Path | None, share: Share | None, report: Report
) -> list[Store]:
    """The index of every root, from `index_dir` where it is there and the data has not changed since, else read anew.

    Without `index_dir` everything is read and nothing is kept. With `share` only the builder reads, and a failure of
    it is raised on every rank.
    Raises: UsageError.
    """
    if index_dir is None:
        return [_read_source(source, report) for source in sources]
    outcome: Any = None
    if share is None or share.is_builder:
        try:
            outcome = [str(_refresh(source, index_dir, report)) for source in sources]
            for folder in outcome:
                mark_used(Path(folder))
            for folder in remove_old_indexes(index_dir):
                report(f"{folder} was not used for {UNUSED_DAYS} days: removed")
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


def _refresh(source: Source, index_dir: Path, report: Report) -> Path:
    """The folder of a valid index of the source, written now if need be."""
    begun = time.monotonic()
    key = digest([str(INDEX_VERSION), *map(repr, (source.path.resolve(), source.format, source.images))])[:16]
    key += "-decoded" if source.decode_images else ""
    before = _stamp_before(source)
    for folder in _newest_first(index_dir.glob(f"{key}-*")):
        store = _try_load(folder)
        if store is None:
            shutil.rmtree(folder, ignore_errors=True)
        elif folder.name == f"{key}-{_stamp_after(before, store.watched(), source)}":
            report(f"{source.path}: {len(store):,} samples, index checked in {time.monotonic() - begun:.1f} s")
            return folder
    columns = _read_columns(source, report)
    watched = Store(columns).watched()
    folder = index_dir / f"{key}-{_stamp_after(before, watched, source)}"
    write_store(columns, folder)
    return folder


def _newest_first(folders: Iterator[Path]) -> list[Path]:
    changed_ns: dict[Path, int] = {}
    for folder in folders:
        with suppress(OSError):  # another job removed it meanwhile
            changed_ns[folder] = folder.stat().st_mtime_ns
    return sorted(changed_ns, key=lambda folder: changed_ns[folder], reverse=True)


def _try_load(folder: Path) -> Store | None:
    """Raises: OSError where the file system fails. That is no damage: another job may have the index mapped."""
    try:
        read_json(folder / "complete.json")
        return load_store(folder)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, KeyError, TypeError):
        return None  # damaged: it is removed and made anew


def _stamp_before(source: Source) -> str:
    """What the data set looks like before it is read: every file of the episodes, or the file of records."""
    if source.format != "episodes":
        return file_stamp(source.path)
    names = FORMATS[source.format].list_units(source, Collector())
    tasks = [StampTask(source.path, names[i : i + UNITS_PER_TASK]) for i in range(0, len(names), UNITS_PER_TASK)]
    # A stat takes a hundredth of what reading takes: more processes than these would only wait for each other.
    processes = num_processes(len(names) // 10)
    return digest(str(result) for _, result in run_tasks(tasks, processes))


def _stamp_after(before: str, watched: Sequence[str], source: Source) -> str:
    folders = [] if source.format == "episodes" else watched
    return digest([before, *(f"{folder}:{file_stamp(Path(folder))}" for folder in folders)])[:16]


def _read_source(source: Source, report: Report) -> Store:
    return Store(_read_columns(source, report))


def _read_columns(source: Source, report: Report) -> Columns:
    """Everything in the data set. Raises: UsageError if it cannot be read at all."""
    begun = last_report = time.monotonic()
    listed = Collector()
    units = FORMATS[source.format].list_units(source, listed)
    tasks = [ReadTask(source, units[i : i + UNITS_PER_TASK]) for i in range(0, len(units), UNITS_PER_TASK)]
    what = "episodes" if source.format == "episodes" else "records"
    parts: dict[int, Columns] = {}
    processes = num_processes(len(units))
    for number, result in run_tasks(tasks, processes):
        if not isinstance(result, Columns):
            raise TrainingFailed(f"the index of {source.path} got a {type(result).__name__} from its reader")
        parts[number] = result
        if time.monotonic() - last_report > REPORT_EVERY_S:
            last_report = time.monotonic()
            report(f"{source.path}: {len(parts) * UNITS_PER_TASK:,} of {len(units):,} {what} read")
    columns = merge_columns([listed.columns(), *(parts[number] for number in sorted(parts))])
    report(
        f"{source.path}: {len(columns.arrays['sample_id']):,} samples of {len(units):,} {what} read "
        f"in {time.monotonic() - begun:.1f} s by {processes} process{'es' if processes > 1 else ''}"
    )
    return columns


def num_processes(num_units: int) -> int:
    """How many processes it pays to start for so many units of work; at most one a core."""
    return max(1, min(len(os.sched_getaffinity(0)), MAX_PROCESSES, num_units // UNITS_PER_PROCESS))


def run_tasks(tasks: Sequence[Task], processes: int) -> Iterator[tuple[int, Any]]:
    """(number, result) of each task: here and in order with one process, else as they come."""
    if processes == 1:
        yield from ((number, run_task(task)) for number, task in enumerate(tasks))
        return
    with ExitStack() as stack:
        idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        for _ in range(processes):
            idle.put(stack.enter_context(_worker()))
        threads = stack.enter_context(ThreadPoolExecutor(processes))
        futures: list[Future[Any]] = [threads.submit(_ask_worker, idle, task) for task in tasks]
        try:
            for number, future in enumerate(futures):
                yield number, future.result()
        finally:
            for future in futures:
                future.cancel()


@contextmanager
def _worker() -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", f"{__package__}.index_worker"]
    # There is a process for each core: threads of the tokenizer's library would only wait for each other.
    env = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as process:
        try:
            yield process
        finally:
            process.kill()


def _ask_worker(idle: queue.SimpleQueue[subprocess.Popen[bytes]], task: Task) -> Any:
    process = idle.get()
    if process.stdin is None or process.stdout is None:
        raise TrainingFailed("a reading process has no pipes")
    try:
        pickle.dump(task, process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
        process.stdin.flush()
        result = pickle.load(process.stdout)
    except (EOFError, OSError) as error:
        raise TrainingFailed(
            f"a process that reads the data died (exit code {process.poll()})",
            hint="its last words are above; too little memory is the usual cause",
        ) from error
    finally:
        idle.put(process)
    return result
