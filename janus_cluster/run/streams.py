"""stdin, stdout and stderr of a command that may find them closed, full or without a reader.

A write to stdout that fails ends the command: with 141, as SIGPIPE would, without a reader; otherwise with 1 and a
line on stderr.
A write to stderr that fails is ignored: a lost message changes neither what a command does nor its exit code.

After a failure the descriptor is /dev/null. Python keeps the text that could not be written and tries once more when it
exits; a second failure there would turn every exit code into 120.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

BROKEN_PIPE_EXIT_CODE = 141


def run_program(program: Callable[[], int]) -> NoReturn:
    """`program` has run with streams that may fail, and the process has ended with the exit code that it returned."""
    for fd in (0, 1, 2):
        _open_if_closed(fd)
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = _rebuild(sys.stdout, _Stdout(1, "wb", closefd=False))
    sys.stderr = _rebuild(sys.stderr, _Stderr(2, "wb", closefd=False))
    try:
        sys.exit(program())
    finally:
        # What is left in the buffer fails here, where the exit code can still be chosen.
        sys.stdout.flush()


class _Stdout(io.FileIO):
    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError as e:
            _discard(self.fileno())
            no_reader = e.errno == errno.EPIPE
            # SystemExit: neither click nor rich nor a loop that tolerates OSError takes it for something of its own.
            raise SystemExit(BROKEN_PIPE_EXIT_CODE if no_reader else f"error: {e.strerror}: standard output") from e


class _Stderr(io.FileIO):
    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError:
            _discard(self.fileno())
            return memoryview(data).nbytes


def _rebuild(old: TextIO | None, raw: io.FileIO) -> TextIO:
    """`old` with its settings over `raw`; text that its encoding lacks is shown as `?`."""
    if not isinstance(old, io.TextIOWrapper):
        # The stream was closed when Python started.
        return io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", errors="replace")
    old.flush()
    return io.TextIOWrapper(
        raw if old.write_through else io.BufferedWriter(raw),
        encoding=old.encoding,
        errors="replace",
        line_buffering=old.line_buffering,
        write_through=old.write_through,
    )


def _open_if_closed(fd: int) -> None:
    """Keep a file that is opened later from becoming a standard stream by taking its number."""
    try:
        os.fstat(fd)
    except OSError:
        _discard(fd)


def _discard(fd: int) -> None:
    """Everything written to `fd` from now on, by children too, goes to /dev/null."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, fd)
    if null == fd:
        os.set_inheritable(fd, True)
    else:
        os.close(null)
