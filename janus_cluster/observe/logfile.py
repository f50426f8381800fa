"""One growing log file: only its new bytes are read, memory stays bounded, and any byte is accepted.

Every line has a time: its own stamp, one that glog (torchrun, c10d) or Slurm wrote, or that of the line before. Lines
after the last time in a file have the time of its last change: they were printed when the process ended.
Of a line that progress bars rewrite with carriage returns, the last version counts.
"""

from __future__ import annotations

import codecs
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, NamedTuple

from janus_cluster.run.stamped import split_stamp
from janus_cluster.run.text import clean

# A line longer than this is shown in pieces, so that a file without line breaks cannot fill the memory.
MAX_LINE_BYTES = 64 * 1024
# New bytes taken from one file per look, so that a fast-growing file does not keep the others from being read.
MAX_READ_BYTES = 256 * 1024
# How far back the view may begin; with it a 1 GB log opens as fast as a small one.
MAX_BACK_BYTES = 4 * 1024 * 1024
# An unfinished line is shown after this long: a prompt, or the last output of a killed process.
IDLE_S = 2.0
# A file that has not grown for a while is opened less often: each open is a request to the file server. A share of the
# time that it has been still, up to this.
_STILL_SHARE = 0.2
_LONGEST_REST_S = 4.0
# A time is looked for this far after an offset; C code may write long stretches without any.
_PROBE_BYTES = 64 * 1024
_MOST_PROBES = 16
# Past that only our own stamps are looked for, which takes 10 ms for 16 MB; and no further than this.
_FAR_BYTES = 64 * 1024 * 1024
_STAMP_AHEAD = re.compile(rb"\n(?=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z)")
_STAMP_BYTES = 25
_FAR_BLOCK_BYTES = 1024 * 1024
# After so many offsets without a following time, the file is taken for one that has none.
_MOST_UNTIMED = 3
# [rank3]:[W1121 14:01:20.299042991 socket.cpp:207] …: the node's local time, without the year.
_GLOG = re.compile(rb"(?:\[rank\d+\]:)?\[?[IWEF](\d\d)(\d\d) (\d\d):(\d\d):(\d\d)\.(\d{6})\d* ")
# slurmstepd: error: *** JOB 7 ON h800-01 CANCELLED AT 2026-11-21T15:26:12 DUE TO TIME LIMIT ***, local time, too;
# from Slurm 25.05 on [2026-11-21T15:26:12.345] error: *** JOB 7 …
_SLURM = re.compile(rb"(?:slurmstepd.* CANCELLED AT |\[)(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)")
_CLOCK_SLACK_S = 2.0


class LogLine(NamedTuple):
    """A clean line without its stamp. Units: time epoch seconds. `is_stamped`: the time was in the line."""

    time: float
    text: str
    is_stamped: bool = False


LineFilter = Callable[[LogLine], bool]


@dataclass
class GrowingFile:
    """The reading position in one log file.

    has_more:    the last look left some of it unread.
    fell_short:  start_at_end found fewer lines than requested, and has not looked at all of the file.
    """

    path: Path
    offset: int = 0
    has_more: bool = False
    fell_short: bool = False
    _since: float | None = None
    _inode: int | None = None
    _partial: bytes = b""
    _last_growth: float = field(default_factory=time.monotonic)
    _looked_at: float = 0.0
    # The last time that was read in the file. Units: epoch seconds.
    _time: float | None = None

    def start_at_end(self, num_lines: int, keep: LineFilter) -> list[LogLine]:
        """The last `num_lines` kept lines that are in the file now; later reads go on from here."""
        try:
            with self.path.open("rb") as f:
                stat = os.fstat(f.fileno())
                self._inode, self.offset, self._last_growth = stat.st_ino, stat.st_size, time.monotonic()
                back = _Backwards(f, stat.st_size, changed_at=stat.st_mtime)
                found: list[LogLine] = []
                # The block that shows enough lines is seldom the first when a filter leaves few of them.
                while back.has_more and (len(found) < num_lines or back.size_read == 0):
                    found = [line for line in back.read_block() if keep(line)] + found
                if len(found) < num_lines:
                    found = [line for line in back.give_up() if keep(line)] + found
        except FileNotFoundError:
            return []
        self._partial, self._time = back.partial[-MAX_LINE_BYTES:], back.newest
        self.fell_short = len(found) < num_lines and back.size_read < stat.st_size
        return found[-num_lines:] if num_lines else []

    def skip_to_end(self) -> None:
        """Later reads begin at the file's present end."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return
        self._inode, self.offset = stat.st_ino, stat.st_size

    def start_at_time(self, since: float) -> None:
        """Later reads begin with the first line that is not older than `since`. Units: epoch seconds.

        Found by bisection: of a file of 1 GB about 20 pieces of 64 KB are read.
        """
        self._since = since
        try:
            with self.path.open("rb") as f:
                stat = os.fstat(f.fileno())
                self._inode = stat.st_ino
                self.offset = stat.st_size if stat.st_mtime < since else _find_offset(f, stat, since)
        except FileNotFoundError:
            return

    def is_due(self, now: float) -> bool:
        """Whether it is time to look at the file again. `now`: by the monotonic clock."""
        return now - self._looked_at >= min(_LONGEST_REST_S, _STILL_SHARE * (now - self._last_growth))

    def read_new(self) -> tuple[list[LogLine], bool]:
        """(lines that were completed since the last look, whether the file was cut short or replaced)."""
        self._looked_at = time.monotonic()
        try:
            # Opened anew at every look: on NFS only an open asks the server for the file's size.
            with self.path.open("rb") as f:
                stat = os.fstat(f.fileno())
                was_cut = self._was_cut(stat)
                self._inode = stat.st_ino
                if was_cut:
                    self.offset, self._partial, self._time = 0, b"", None
                data = b""
                if stat.st_size > self.offset:
                    f.seek(self.offset)
                    data = f.read(MAX_READ_BYTES)
        except FileNotFoundError:
            return [], False
        if not data:
            self.has_more = False
            return [], was_cut
        self.offset += len(data)
        self.has_more = self.offset < stat.st_size
        self._last_growth = time.monotonic()
        *ended, rest = (self._partial + data).split(b"\n")
        self._partial = _cut_invisible(rest)
        while len(self._partial) > MAX_LINE_BYTES:
            ended.append(self._partial[:MAX_LINE_BYTES])
            self._partial = self._partial[MAX_LINE_BYTES:]
        times, self._time = _find_times(ended, before=self._time, changed_at=stat.st_mtime, is_at_end=not self.has_more)
        pairs = zip(ended, times, strict=True)
        lines = [line for raw, when in pairs for line in _split_long(raw, when or stat.st_mtime)]
        return [line for line in lines if self._since is None or line.time >= self._since], was_cut

    def read_partial(self, *, at_end: bool) -> list[LogLine]:
        """The unfinished last line, once it has not changed for IDLE_S or the job is over."""
        if not self._partial or not (at_end or time.monotonic() - self._last_growth >= IDLE_S):
            return []
        stamped, body = split_stamp(self._partial)
        self._time = stamped or self._time or time.time()
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = clean(decoder.decode(body, final=at_end))
        # Half a character is kept until its other half has been read.
        self._partial = b"" if at_end else decoder.getstate()[0]
        return [LogLine(self._time, text, stamped is not None)] if text else []

    def _was_cut(self, stat: os.stat_result) -> bool:
        return stat.st_size < self.offset or (self._inode is not None and stat.st_ino != self._inode)


class _Backwards:
    """A file read from its end towards its beginning, in blocks that double, each line with its time."""

    def __init__(self, file: BinaryIO, size: int, *, changed_at: float) -> None:
        self.partial = b""
        self.newest: float | None = None
        self._file = file
        self._start = self._size = size
        self._changed_at = changed_at
        self._head = b""
        self._is_at_end = True
        # Lines of later blocks before the first time there: the next block to be read determines theirs.
        self._untimed: list[bytes] = []
        self._oldest: float | None = None

    @property
    def size_read(self) -> int:
        return self._size - self._start

    @property
    def has_more(self) -> bool:
        return self._start > 0 and self.size_read < MAX_BACK_BYTES

    def read_block(self) -> list[LogLine]:
        """The lines of one block more, and those of later blocks whose time is now known."""
        step = min(self._start, max(MAX_LINE_BYTES, self.size_read))
        self._start -= step
        self._file.seek(self._start)
        whole = self._file.read(step) + self._head
        self._head = b""
        if self._start > 0:
            first, line_break, rest = whole.partition(b"\n")
            self._head, whole = first + line_break, rest
        if self.size_read == step:
            whole, line_break, self.partial = whole.rpartition(b"\n")
            self.partial = _cut_invisible(self.partial)
            whole += line_break
        if not whole:
            return []
        raws = whole.removesuffix(b"\n").split(b"\n")
        times, newest = _find_times(raws, before=None, changed_at=self._changed_at, is_at_end=self._is_at_end)
        if newest is None:
            self._untimed = raws + self._untimed
            return []
        known = next(i for i, when in enumerate(times) if when is not None)
        waited = [line for raw in self._untimed for line in _split_long(raw, newest)]
        self._untimed, self._oldest = raws[:known], times[known]
        self._is_at_end, self.newest = False, newest if self.newest is None else self.newest
        pairs = zip(raws[known:], times[known:], strict=True)
        return [line for raw, when in pairs for line in _split_long(raw, when or newest)] + waited

    def give_up(self) -> list[LogLine]:
        """The lines before any time: they get the first one after them."""
        when = self._changed_at if self._oldest is None else self._oldest
        lines = [line for raw in self._untimed for line in _split_long(raw, when)]
        self._untimed = []
        return lines


def _find_times(
    raws: Sequence[bytes], *, before: float | None, changed_at: float, is_at_end: bool
) -> tuple[list[float | None], float | None]:
    """(the time of every line, the last known time); a line without one has that of the line before.

    before: the known time of the line before the first. is_at_end: the file ends with the last of them.
    """
    times: list[float | None] = []
    last, num_timed = before, 0
    for raw in raws:
        when = _own_time(raw, changed_at=changed_at, after=last)
        if when is not None:
            last, num_timed = when, len(times) + 1
        times.append(last)
    if is_at_end and num_timed < len(raws):
        last = changed_at if last is None else max(changed_at, last)
        times[num_timed:] = [last] * (len(raws) - num_timed)
    return times, last


def _own_time(raw: bytes, *, changed_at: float, after: float | None = None) -> float | None:
    """The time in the line; glog's and Slurm's only where it is between `after` and the last change."""
    when, _ = split_stamp(raw)
    if when is not None:
        return when
    stamped_at = (
        _glog_time(raw, changed_at) if (found := _SLURM.match(raw)) is None else _local_time(*map(int, found.groups()))
    )
    if stamped_at is None:
        return None
    # Written in another time zone than this reader's, it would be hours off.
    fits = stamped_at <= changed_at + _CLOCK_SLACK_S and (after is None or stamped_at >= after - _CLOCK_SLACK_S)
    return stamped_at if fits else None


def _glog_time(raw: bytes, changed_at: float) -> float | None:
    found = _GLOG.match(raw)
    if found is None:
        return None
    month, day, *clock = (int(n) for n in found.groups())
    changed = datetime.fromtimestamp(changed_at)
    return _local_time(changed.year - (month == 12 and changed.month == 1), month, day, *clock)


def _local_time(*numbers: int) -> float | None:
    try:
        return datetime(*numbers).timestamp()  # type: ignore[arg-type]
    except ValueError:
        return None


def _find_offset(file: BinaryIO, stat: os.stat_result, since: float) -> int:
    """A place before the first line that is not older than `since`, and not far before."""
    low, high, is_timed, num_untimed = 0, stat.st_size, False, 0
    while high - low > _PROBE_BYTES and (is_timed or num_untimed < _MOST_UNTIMED):
        middle = (low + high) // 2
        when, at = _next_time(file, middle, high, changed_at=stat.st_mtime)
        num_untimed += when is None
        if when is not None and when < since:
            low, is_timed = at, True
        else:
            high, is_timed = middle, is_timed or when is not None
    if is_timed or stat.st_size <= MAX_BACK_BYTES:
        return low
    return _next_line(file, stat.st_size - MAX_BACK_BYTES)


def _next_time(file: BinaryIO, start: int, end: int, *, changed_at: float) -> tuple[float | None, int]:
    """(the first time in a line that begins after `start`, where that line begins)."""
    at = _next_line(file, start)
    file.seek(at)
    limit = min(end, at + _PROBE_BYTES * _MOST_PROBES)
    while at < limit:
        raw = file.readline(_PROBE_BYTES)
        when = _own_time(raw, changed_at=changed_at)
        if when is not None:
            return when, at
        at += len(raw)
        if not raw:
            break
    far = _find_stamp(file, at, min(end, start + _FAR_BYTES))
    if far is None:
        return None, at
    file.seek(far)
    return _own_time(file.readline(_PROBE_BYTES), changed_at=changed_at), far


def _find_stamp(file: BinaryIO, start: int, end: int) -> int | None:
    """Offset of the first line between the offsets that begins with a stamp of ours."""
    at = start
    while at < end:
        file.seek(at)
        block = file.read(_FAR_BLOCK_BYTES)
        if found := _STAMP_AHEAD.search(block):
            return at + found.end() if at + found.end() < end else None
        if len(block) <= _STAMP_BYTES:
            break
        # The end of a block may hold the beginning of a stamp.
        at += len(block) - _STAMP_BYTES
    return None


def _next_line(file: BinaryIO, start: int) -> int:
    if start == 0:
        return 0
    file.seek(start - 1)
    return start - 1 + len(file.readline(_PROBE_BYTES))


def _cut_invisible(raw: bytes) -> bytes:
    """An unfinished line as a terminal shows it: only what follows the last carriage return; with its stamp."""
    body = split_stamp(raw)[1]
    visible = body[body.rstrip(b"\r").rfind(b"\r") + 1 :]
    return raw[: len(raw) - len(body)] + visible


def _split_long(raw: bytes, when: float) -> list[LogLine]:
    stamped, body = split_stamp(raw)
    visible = body.rstrip(b"\r").rpartition(b"\r")[2]
    if len(visible) <= MAX_LINE_BYTES:
        return [LogLine(when, clean(visible.decode("utf-8", "replace")), stamped is not None)]
    pieces = [visible[i : i + MAX_LINE_BYTES] for i in range(0, len(visible), MAX_LINE_BYTES)]
    return [LogLine(when, clean(piece.decode("utf-8", "replace")), stamped is not None) for piece in pieces]
