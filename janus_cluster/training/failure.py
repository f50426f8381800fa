"""A rank records the exception that ends it: failures/rank<r>.json, which the node's classifier reads first."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from janus_cluster.errors import JanusError, TrainingFailed
from janus_cluster.run.records.failure import RankFailure

# The innermost frames and the message are at the end.
_MOST_TRACEBACK = 32 * 1024
_MOST_MESSAGE = 16 * 1024


@contextmanager
def failure_recorded(path: Path, *, rank: int, node: str) -> Iterator[None]:
    """An exception that leaves the block is in `path`, and is raised as it was."""
    try:
        yield
    except Exception as error:
        # A record that cannot be written, on a full disk, must not take the place of the error.
        with suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            describe_error(error, rank=rank, node=node).write(path)
        raise


def describe_error(error: BaseException, *, rank: int, node: str) -> RankFailure:
    """The record of an exception that ends this rank now."""
    ours = error if isinstance(error, JanusError) else None
    return RankFailure(
        rank=rank,
        node=node,
        time=time.time(),
        type=type(error).__name__,
        message=str(error)[:_MOST_MESSAGE],
        hint=ours.hint if ours else None,
        kind=ours.kind if ours else None,
        is_follow_up=isinstance(error, TrainingFailed) and error.is_follow_up,
        traceback="".join(traceback.format_exception(error))[-_MOST_TRACEBACK:],
    )
