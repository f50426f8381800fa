"""One log file that grows: only its new bytes are read, memory stays bounded, and any byte may come.

Progress bars rewrite a line with carriage returns: of such a line the last version counts.
"""

from __future__ import annotations

import codecs
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from janus_cluster.observe.text import clean

# A line longer than this is shown in pieces, so that a file without line breaks cannot fill the memory.
MAX_LINE_BYTES = 64 * 1024
# New bytes taken from one file per look: a file that grows faster than this cannot keep the others from being read.
MAX_READ_BYTES = 1024 * 1024
# How far back the beginning of the view may lie; 1 GB logs open as fast as small ones.
MAX_BACK_BYTES = 4 * 1024 * 1024
# A line without its end is shown after this long: a prompt, or the last words of a process that was killed.
IDLE_S = 2.0

LineFilter = Callable[[str], bool]


@dataclass
class GrowingFile:
    """The reading position in one log file."""

    path: Path
    offset: int = 0
    _inode: int | None = None
    _partial: bytes = b""
    _last_growth: float = field(default_factory=time.monotonic)

    def start_at_end(self, num_lines: int, keep: LineFilter) -> list[str]:
        """The last `num_lines` kept lines that are in the file now; later reads go on from here."""
        try:
            with self.path.open("rb") as f:
                self._inode = os.fstat(f.fileno()).st_ino
                size = f.seek(0, os.SEEK_END)
                data, start = b"", size
                # The block that shows enough lines is seldom the first when a filter leaves few of them.
                while start > 0 and size - start < MAX_BACK_BYTES:
                    step = min(start, max(MAX_LINE_BYTES, size - start))
                    start -= step
                    f.seek(start)
                    data = f.read(size - start)
                    whole = data if start == 0 else data.partition(b"\n")[2]
                    if len(_kept(whole, keep)) >= num_lines:
                        break
        except FileNotFoundError:
            return []
        whole, line_break, self._partial = data.rpartition(b"\n")
        self._partial = self._partial[-MAX_LINE_BYTES:]
        self.offset = size
        self._last_growth = time.monotonic()
        if start > 0:
            whole = whole.partition(b"\n")[2]
        return _kept(whole + line_break, keep)[-num_lines:] if num_lines else []

    def read_new(self) -> tuple[list[str], bool]:
        """(lines that were completed since the last look, whether the file was cut short or replaced)."""
        try:
            # Opened anew at every look: on NFS only an open asks the server for the file's size.
            with self.path.open("rb") as f:
                stat = os.fstat(f.fileno())
                was_cut = self._was_cut(stat)
                self._inode = stat.st_ino
                if was_cut:
                    self.offset, self._partial = 0, b""
                f.seek(self.offset)
                data = f.read(MAX_READ_BYTES)
        except FileNotFoundError:
            return [], False
        self.offset += len(data)
        if data:
            self._last_growth = time.monotonic()
        *ended, rest = (self._partial + data).split(b"\n")
        lines = [text for raw in ended for text in _split_long(raw)]
        # Of an unfinished line only what stands after the last carriage return can still be seen on a terminal.
        if (at := rest.rstrip(b"\r").rfind(b"\r")) >= 0:
            rest = rest[at + 1 :]
        while len(rest) > MAX_LINE_BYTES:
            lines.append(clean(rest[:MAX_LINE_BYTES].decode("utf-8", "replace")))
            rest = rest[MAX_LINE_BYTES:]
        self._partial = rest
        return lines, was_cut

    def read_partial(self, *, at_end: bool) -> list[str]:
        """The unfinished last line, once it has stood still for IDLE_S or the job is over."""
        if not self._partial or not (at_end or time.monotonic() - self._last_growth >= IDLE_S):
            return []
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = clean(decoder.decode(self._partial, final=at_end))
        # Half a character stays behind until its other half has come.
        self._partial = b"" if at_end else decoder.getstate()[0]
        return [text] if text else []

    def _was_cut(self, stat: os.stat_result) -> bool:
        return stat.st_size < self.offset or (self._inode is not None and stat.st_ino != self._inode)


def _kept(data: bytes, keep: LineFilter) -> list[str]:
    if not data:
        return []
    lines = [text for raw in data.removesuffix(b"\n").split(b"\n") for text in _split_long(raw)]
    return [line for line in lines if keep(line)]


def _split_long(raw: bytes) -> list[str]:
    visible = raw.rstrip(b"\r").rpartition(b"\r")[2]
    pieces = [visible[i : i + MAX_LINE_BYTES] for i in range(0, len(visible), MAX_LINE_BYTES)] or [b""]
    return [clean(piece.decode("utf-8", "replace")) for piece in pieces]
