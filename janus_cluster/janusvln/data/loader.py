"""Batches from worker processes; what a worker cannot hand over is an error of the rank that waits for it."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.queues import Queue
from typing import Any, NoReturn

from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset

from janus_cluster.errors import TrainingFailed

Batch = dict[str, Any]


def build_loader(
    dataset: Dataset[Batch],
    *,
    batches: Iterable[list[int]],
    collate: Callable[[Sequence[Batch]], Batch],
    num_workers: int,
    pin_memory: bool,
    timeout_s: float = 0,
) -> DataLoader[Batch]:
    """The batches of these indices, in this order. Without one for `timeout_s` the rank raises; 0 is no limit."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        timeout=timeout_s if num_workers else 0,
        worker_init_fn=_report_unsent_batches if num_workers else None,
    )


class _Unsent(ExceptionWrapper):
    """Sent in place of a batch that could not be sent; DataLoader has the rank raise it."""

    def __init__(self, error: BaseException) -> None:
        self._cause = f"{type(error).__name__}: {error}"

    def reraise(self) -> NoReturn:
        raise TrainingFailed(f"a data loader's worker could not hand over a batch: {self._cause}", kind="loader")


def _report_unsent_batches(_worker_id: int) -> None:
    """In this worker process: a batch that cannot be sent (/dev/shm is full, $TMPDIR too long) is an error of the rank.

    Otherwise the thread that sends would print the error and continue, and the rank would wait without limit.
    """
    Queue._on_queue_feeder_error = _send_error  # type: ignore[attr-defined]


def _send_error(queue: Queue[object], error: BaseException, item: object) -> None:
    traceback.print_exception(error)
    if not isinstance(item, tuple):
        # Pickled already: the number of its batch is not known here. The rank raises that a worker is gone.
        os._exit(1)
    queue.put((item[0], _Unsent(error)))
