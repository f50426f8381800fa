"""Run work in several processes, with the results in order."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

from janus_cluster.errors import TrainingFailed
from janus_cluster.run.parent import end_with_parent

T = TypeVar("T")
TASKS_PER_PROCESS = 2


def run_tasks(tasks: Iterable[Callable[[], T]], processes: int) -> Iterator[T]:
    """The result of each task, in order. No more tasks are taken than keep the processes busy.

    Raises: TrainingFailed where a process died.
    """
    if processes == 1:
        for task in tasks:
            yield task()
        return
    # Not a fork: the trainer's process holds torch, threads and a device.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_begin, initargs=(os.getpid(),))
    futures: deque[Future[T]] = deque()
    try:
        for task in tasks:
            futures.append(pool.submit(task))
            if len(futures) > TASKS_PER_PROCESS * processes:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    except BrokenProcessPool as error:
        raise TrainingFailed(
            "a process that reads the data died",
            hint="its last lines are above; too little memory is the usual cause",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(parent: int) -> None:
    # The pool would leave its processes behind where the program is killed.
    if not end_with_parent(parent):
        os._exit(1)
    # Ctrl-C reaches every process: one traceback, of the program, is enough.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # There is a process for each core: threads of the tokenizer's library would only wait for each other.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
