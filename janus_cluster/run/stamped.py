"""Lines of a run's logs begin with their time, UTC: `2026-11-21T14:01:43.623Z step 3/20 …`. Written and read here.

What passes through Python's sys.stdout and sys.stderr gets a stamp. What C code, a library or a shell writes to the
file itself has none; a reader gives it the time of the line before. A leaf: every room may import it, `training` too.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

_STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
_LEADING = re.compile(rf"^{_STAMP}(?: |$)", re.MULTILINE)
_LEADING_BYTES = re.compile((_STAMP + r"(?: |(?=[\r\n])|$)").encode())
# A line without an end is written in pieces of this size: a writer that never ends one cannot fill the memory.
_MOST_HELD = 64 * 1024


@dataclass
class _File:
    """What the streams that write to one file share."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    # What was printed and is not written yet, None for a flush: a signal handler that prints while a line is being
    # written leaves its own here.
    queue: deque[tuple[StampedStream, int, str | None]] = field(default_factory=deque)
    is_busy: bool = False
    # The stream and thread that left a line unfinished, and whether it holds a progress bar.
    owner: tuple[StampedStream, int] | None = None
    is_bar: bool = False

    def take(self, stream: StampedStream, text: str | None) -> None:
        """The text is in the file as far as its lines have ended, after all that was printed before."""
        with self.lock:
            self.queue.append((stream, threading.get_ident(), text))
            while self.queue and not self.is_busy:
                self.is_busy = True
                try:
                    while self.queue:
                        printer, thread, printed = self.queue.popleft()
                        printer.put(thread, printed)
                finally:
                    self.is_busy = False


class StampedStream(io.TextIOWrapper):
    """A text stream on a file descriptor in which every line begins with the time at which it was begun.

    A line is held until it ends or `flush` is called, and then written at once: lines of several threads and processes
    that append to one file stay whole. What a progress bar writes after a carriage return is the same line still;
    anything else that is printed while the bar is there begins a line of its own.
    """

    def __init__(self, fd: int, file: _File | None = None) -> None:
        super().__init__(
            io.FileIO(fd, "wb", closefd=False),
            encoding="utf-8",
            errors="backslashreplace",
            newline="\n",
            write_through=True,
        )
        self._file = _File() if file is None else file
        # By thread: one may print while another is in the middle of its line.
        self._held: dict[int, str] = {}

    def write(self, text: str) -> int:
        """The lines that `text` completes are in the file."""
        self._file.take(self, text)
        return len(text)

    def flush(self) -> None:
        """An unfinished line is in the file, too."""
        self._file.take(self, None)

    def put(self, thread: int, text: str | None) -> None:
        """For the file: it is the text's turn; None is the turn of everything that is held."""
        if text is None:
            while self._held:
                self._put(*self._held.popitem(), "")
            return
        whole, line_break, rest = (self._held.pop(thread, "") + text).rpartition("\n")
        if len(rest) > _MOST_HELD:
            whole, line_break, rest = whole + line_break + rest, "", ""
        if rest:
            self._held[thread] = rest
        if whole or line_break:
            self._put(thread, whole, line_break)

    def _put(self, thread: int, text: str, line_break: str) -> None:
        file, printer = self._file, (self, thread)
        stamp = f"{render_stamp(time.time())} "
        goes_on = file.owner == printer and not (file.is_bar and text and not text.startswith(("\r", "\n")))
        first = "" if goes_on else stamp if file.owner is None else f"\n{stamp}"
        file.owner = None if line_break else printer
        last = text.rpartition("\n")[2]
        file.is_bar = "\r" in last or (goes_on and file.is_bar and "\n" not in text)
        data = memoryview((first + text.replace("\n", f"\n{stamp}") + line_break).encode("utf-8", "backslashreplace"))
        while data:
            data = data[os.write(self.fileno(), data) :]

    def forget_other_threads(self) -> None:
        """Make the stream usable in a forked process, which has no other thread that could release the lock."""
        self._file.lock, self._file.is_busy = threading.RLock(), False
        self._file.queue.clear()
        self._held.clear()


def stamp_output() -> None:
    """Every line that this process prints from here on begins with its time, those of loggers made before, too."""
    file = _File()
    for name, fd in (("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name)
        old.flush()
        new = StampedStream(fd, file)
        os.register_at_fork(after_in_child=new.forget_other_threads)
        setattr(sys, name, new)
        _move_handlers(old, new)


def _move_handlers(old: Any, new: StampedStream) -> None:
    known = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in known:
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and handler.stream is old:
                handler.setStream(new)


def render_stamp(seconds: float) -> str:
    """`2026-11-21T14:01:43.623Z`. Units: epoch seconds."""
    whole, milliseconds = divmod(int(seconds * 1000), 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{milliseconds:03d}Z"


def split_stamp(raw: bytes) -> tuple[float | None, bytes]:
    """(the line's time in epoch seconds, the line without its stamp); (None, the line) for one that has none."""
    found = _LEADING_BYTES.match(raw)
    if found is None:
        return None, raw
    try:
        # Without its Z: Python 3.10 reads none.
        when = datetime.fromisoformat(found[0][:23].decode("ascii")).replace(tzinfo=timezone.utc)
        return when.timestamp(), raw[found.end() :]
    except ValueError:
        return None, raw


def strip_stamps(text: str) -> str:
    """The text as it was printed: no line begins with a stamp."""
    return _LEADING.sub("", text)
