"""The index of each root, read by several processes once and kept until the data changes."""

from __future__ import annotations

import os
import pickle
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from janus_cluster.errors import JanusError, TrainingFailed, UsageError
from janus_cluster.training.data.formats.registry import FORMATS
from janus_cluster.training.data.formats.source import Source, digest, file_stamp
from janus_cluster.training.data.index_tasks import ReadTask, StampTask, Task, run_task
from janus_cluster.training.data.old_indexes import UNUSED_DAYS, mark_used, remove_old_indexes
from janus_cluster.training.data.store import (
    Columns,
    Store,
    load_store,
    write_store,
)

INDEX_VERSION = 5  # raised where an index holds something else for the same data
UNITS_PER_TASK = 256
# A process more takes 0.4 s to start; about 500 episodes are read in that time.
UNITS_PER_PROCESS = 1_000
MAX_PROCESSES = 32
TASKS_PER_PROCESS = 2
REPORT_EVERY_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Told:
    """Whom to tell: `report` takes lines of text, `progress` how far a root is read (else a line now and then)."""

    report: Callable[[str], None] = lambda _: None
    progress: Callable[[str, float], None] | None = None


@dataclass(frozen=True)
class Share:
    """How the ranks agree: one builds, `broadcast` gives its value to all (it is called on every rank)."""

    is_builder: bool
    broadcast: Callable[[Any], Any]


def load_stores(sources: Sequence[Source], *, index_dir: Path | None, share: Share | None, told: Told) -> list[Store]:
    """The index of every root, from `index_dir` where it is there and the data has not changed since, else read anew.

    Without `index_dir` everything is read and nothing is kept. With `share` only the builder reads, and a failure of
    it is raised on every rank.
    Raises: UsageError.
    """
    if index_dir is None:
        return [_read_source(source, told) for source in sources]
    outcome: Any = None
    if share is None or share.is_builder:
        try:
            outcome = [str(_refresh(source, index_dir, told)) for source in sources]
            for folder in outcome:
                mark_used(Path(folder))
            for folder in remove_old_indexes(index_dir):
                told.report(f"{folder} was not used for {UNUSED_DAYS} days: removed")
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


def _refresh(source: Source, index_dir: Path, told: Told) -> Path:
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
            told.report(f"{source.path}: {len(store):,} samples, index checked in {time.monotonic() - begun:.1f} s")
            return folder
    index_dir.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=index_dir, prefix=".building-"))
    try:
        watched = write_store(_read_parts(source, told), building).watched()
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
    tasks = [StampTask(source.path, names[i : i + UNITS_PER_TASK]) for i in range(0, len(names), UNITS_PER_TASK)]
    # A stat takes a hundredth of what reading takes: more processes than these would only wait for each other.
    processes = num_processes(len(names) // 10)
    return digest(map(str, run_tasks(tasks, processes)))


def _stamp_after(before: str, watched: Sequence[str], source: Source) -> str:
    folders = [] if source.format == "episodes" else watched
    return digest([before, *(f"{folder}:{file_stamp(Path(folder))}" for folder in folders)])[:16]


def _read_source(source: Source, told: Told) -> Store:
    """An index that nothing keeps: its columns are in memory."""
    with tempfile.TemporaryDirectory(prefix="janus-index-") as name:
        return write_store(_read_parts(source, told), Path(name)).in_memory()


def _read_parts(source: Source, told: Told) -> Iterator[Columns]:
    """Everything in the data set, a part after the other. Raises: UsageError if it cannot be read at all."""
    begun = last_told = time.monotonic()
    units = FORMATS[source.format].list_units(source)
    what = "episodes" if source.format == "episodes" else "records"
    stream = iter(units)
    # How many there are of a file's records, nobody knows before its end.
    first = list(islice(stream, 2 * UNITS_PER_PROCESS))
    processes = num_processes(int(len(first) / max(units.share_read(), 1e-9)))
    num_units = num_samples = 0

    def tasks() -> Iterator[ReadTask]:
        nonlocal num_units
        everything = chain(first, stream)
        while part := list(islice(everything, UNITS_PER_TASK)):
            num_units += len(part)
            yield ReadTask(source, part)

    for result in run_tasks(tasks(), processes):
        if not isinstance(result, Columns):
            raise TrainingFailed(f"the index of {source.path} got a {type(result).__name__} from its reader")
        yield result
        num_samples += len(result.arrays["sample_id"])
        if told.progress is not None:
            told.progress(f"{source.path.name}: {num_units:,} {what}", units.share_read())
        elif time.monotonic() - last_told > REPORT_EVERY_S:
            last_told = time.monotonic()
            told.report(f"{source.path}: {num_units:,} {what} read ({units.share_read():.0%})")
    told.report(
        f"{source.path}: {num_samples:,} samples of {num_units:,} {what} read "
        f"in {time.monotonic() - begun:.1f} s by {processes} process{'es' if processes > 1 else ''}"
    )


def num_processes(num_units: int) -> int:
    """How many processes it pays to start for so many units of work; at most one a core."""
    return max(1, min(len(os.sched_getaffinity(0)), MAX_PROCESSES, num_units // UNITS_PER_PROCESS))


def run_tasks(tasks: Iterable[Task], processes: int) -> Iterator[Any]:
    """The result of each task, in order. No more tasks are taken than keep the processes busy."""
    if processes == 1:
        yield from map(run_task, tasks)
        return
    with ExitStack() as stack:
        idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        for _ in range(processes):
            idle.put(stack.enter_context(_worker()))
        threads = stack.enter_context(ThreadPoolExecutor(processes))
        futures: deque[Future[Any]] = deque()
        try:
            for task in tasks:
                futures.append(threads.submit(_ask_worker, idle, task))
                if len(futures) > TASKS_PER_PROCESS * processes:
                    yield futures.popleft().result()
            while futures:
                yield futures.popleft().result()
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
