"""Batches from worker processes; a worker that cannot hand one over ends at once, with its words in the rank's log."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.queues import Queue
from typing import Any, NoReturn

from torch.utils.data import DataLoader, Dataset

Batch = dict[str, Any]
# The failure card looks for it (observe/failure.py): what the rank itself raises says only that a worker is gone.
WORKER_SAYS = "data loader worker: "


def build_loader(
    dataset: Dataset[Batch],
    *,
    batches: Iterable[list[int]],
    collate: Callable[[Sequence[Batch]], Batch],
    num_workers: int,
    pin_memory: bool,
    timeout_s: float = 0,
) -> DataLoader[Batch]:
    """The batches of these indices, in this order. Without one for `timeout_s` the rank raises; 0 waits for ever."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        timeout=timeout_s if num_workers else 0,
        worker_init_fn=end_where_a_batch_cannot_be_sent if num_workers else None,
    )


def end_where_a_batch_cannot_be_sent(_worker_id: int) -> None:
    """This worker process ends where it cannot send a batch: /dev/shm is full, or $TMPDIR too long for a socket.

    The thread that sends would print the error and go on, and the rank would wait for that batch for ever.
    """
    Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]


def _end(error: BaseException, _batch: object) -> NoReturn:
    traceback.print_exception(error)
    print(f"{WORKER_SAYS}{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(1)
