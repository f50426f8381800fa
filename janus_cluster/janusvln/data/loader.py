"""Batches from worker processes; what a worker cannot hand over is an error of the rank that waits for it."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import re
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, NoReturn

from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset

from janus_cluster.errors import TrainingFailed

Batch = dict[str, Any]

# faulthandler writes a worker's stack there when the signal arrives; the rank reads it through /proc.
_STACK_SIGNAL = signal.SIGUSR2
_STACK_FILE = "janus-stack"
_STACK_S = 2.0
_MOST_NAMED = 3
# The worker's own loop: a worker that is in nothing else waits for the next list of indices.
_LOOP = "torch/utils/data/_utils/worker.py"
_FETCH = "torch/utils/data/_utils/fetch.py"
_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (\S+)$', re.MULTILINE)


def build_loader(
    dataset: Dataset[Batch],
    *,
    batches: Iterable[list[int]],
    collate: Callable[[Sequence[Batch]], Batch],
    num_workers: int,
    pin_memory: bool,
    timeout_s: float = 0,
) -> DataLoader[Batch]:
    """The batches of these indices, in this order. Without one for `timeout_s` the rank raises; 0 is no limit.

    Who iterates does it inside `stuck_workers_named`.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        timeout=timeout_s if num_workers else 0,
        worker_init_fn=_init_worker if num_workers else None,
    )


class _Unsent(ExceptionWrapper):
    """Sent in place of a batch that could not be sent; DataLoader has the rank raise it."""

    def __init__(self, error: BaseException) -> None:
        self._cause = f"{type(error).__name__}: {error}"

    def reraise(self) -> NoReturn:
        raise TrainingFailed(f"a data loader's worker could not hand over a batch: {self._cause}", kind="loader")


def _init_worker(_worker_id: int) -> None:
    """In this worker process: a batch that cannot be sent (/dev/shm is full, $TMPDIR too long) is an error of the rank.

    Otherwise the thread that sends would print the error and continue, and the rank would wait without limit. What the
    worker is doing can be asked for: a file without a name, so that nothing is left behind, takes its stack.
    """
    Queue._on_queue_feeder_error = _send_error  # type: ignore[attr-defined]
    # faulthandler keeps the file open.
    file = os.fdopen(os.memfd_create(_STACK_FILE), "w+b", buffering=0)
    faulthandler.register(_STACK_SIGNAL, file=file, all_threads=False)


@contextmanager
def stuck_workers_named() -> Iterator[None]:
    """The error of a batch that is late names what the worker processes are doing.

    Raises: TrainingFailed in place of DataLoader's RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader timed out"):
            raise
        raise TrainingFailed(f"{error}: {_describe_workers()}", kind="loader") from error


def _describe_workers() -> str:
    """What each of the loader's workers is doing, in one line: state and innermost frames."""
    files = {w.pid: path for w in multiprocessing.active_children() if w.pid and (path := _find_stack_file(w.pid))}
    for pid in files:
        with suppress(ProcessLookupError):
            os.kill(pid, _STACK_SIGNAL)
    deadline_s = time.monotonic() + _STACK_S
    stacks: dict[int, str] = {}
    while len(stacks) < len(files) and time.monotonic() < deadline_s:
        time.sleep(0.05)
        # A stack has no end mark. It is written by one signal handler, within far less than the pause before this look.
        stacks = {pid: text for pid, path in files.items() if (text := _read_stack(path))}
    at_work = {pid: doing for pid in files if (doing := _describe_stack(stacks.get(pid, ""), _read_state(pid)))}
    if not at_work:
        return f"its {len(files)} workers wait for indices; what they made did not arrive"
    named = [f"worker {pid} {doing}" for pid, doing in list(at_work.items())[:_MOST_NAMED]]
    more = [f"and {len(at_work) - _MOST_NAMED} more"] if len(at_work) > _MOST_NAMED else []
    return "; ".join([*named, *more])


def _find_stack_file(pid: int) -> Path | None:
    """The worker's own file, as this process can open it; None for a child that is no loader's."""
    try:
        return next(p for p in Path(f"/proc/{pid}/fd").iterdir() if _STACK_FILE in str(p.readlink()))
    except (OSError, StopIteration):
        return None


def _read_stack(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _describe_stack(stack: str, state: str) -> str | None:
    """None for a worker that waits for indices."""
    if not stack:
        waits = "; it waits in the kernel, as for a file system that does not answer" if state == "D" else ""
        return f"does not answer (state {state}{waits})"
    frames = _FRAME.findall(stack)
    places = [path.endswith(_FETCH) for path, _, _ in frames]
    if not any(places) and any(path.endswith(_LOOP) for path, _, _ in frames):
        return None
    own = frames[: places.index(True)] if any(places) else frames
    return "is in " + " of ".join(f"{name} ({path}:{line})" for path, line, name in own[:3])


def _read_state(pid: int) -> str:
    """The kernel's letter, such as S (sleeps), D (waits, and no signal ends it), T (stopped)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "gone"


def _send_error(queue: Queue[object], error: BaseException, item: object) -> None:
    traceback.print_exception(error)
    if not isinstance(item, tuple):
        # Pickled already: the number of its batch is not known here. The rank raises that a worker is gone.
        os._exit(1)
    queue.put((item[0], _Unsent(error)))
