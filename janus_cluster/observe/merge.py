"""Merge the lines of many files by time; equal lines of several ranks become one.

Ranks print equal lines within moments of each other, and a read may fall between: a line waits HOLD_S before it is
shown, so that the others can join it. Lines of one file keep their order even against their times, except for one that
joins an earlier line of another rank.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from janus_cluster.observe.logfile import LogLine
from janus_cluster.observe.tail_view import LogSource

# Equal lines no further apart than this count as one.
WINDOW_S = 2.0
HOLD_S = 1.0


# A line of c10d or torchrun has a time and a rank of its own: [rank3]:[W1121 14:01:20.299042991 socket.cpp:207] …
_GLOG = re.compile(r"(?:\[rank\d+\]:)?\[?[IWEF]\d{4} [\d:.]+ (?: *\d+ )?")


@dataclass
class Group:
    """One line, and every source that printed it; text and time are the first one's. Units: time epoch seconds."""

    time: float
    text: str
    is_stamped: bool
    sources: list[LogSource]


class _Waiting(NamedTuple):
    """A line that was read but not shown yet. `key` orders it; `arrival` is on the reader's own clock."""

    key: tuple[float, tuple[int, str, int], int]
    arrival: float
    source: LogSource
    line: LogLine


class Merge:
    """The lines that wait to be shown."""

    def __init__(self, *, hold_s: float = HOLD_S, collapses: bool = True) -> None:
        self.hold_s = hold_s
        self._collapses = collapses
        self._waiting: list[_Waiting] = []
        self._newest: dict[LogSource, float] = {}
        self._count = 0

    def add(self, source: LogSource, lines: Sequence[LogLine], *, now: float, read_to: float = 0.0) -> None:
        """Queue the lines. read_to: the time of the last line that was read, shown or not."""
        newest = self._newest.get(source, 0.0)
        for line in lines:
            newest = max(newest, line.time)
            self._count += 1
            self._waiting.append(_Waiting((newest, source.order, self._count), now, source, line))
        self._newest[source] = max(newest, read_to)

    def newest_of(self, source: LogSource) -> float:
        """The time up to which the source's lines have been added."""
        return self._newest.get(source, 0.0)

    def take(self, *, now: float, until: float | None = None, everything: bool = False) -> list[Group]:
        """The groups that are due, oldest first. Only lines up to the time `until`, where that is given."""
        self._waiting.sort(key=lambda w: w.key)
        due = [w.key[0] for w in self._waiting if everything or now - w.arrival >= self.hold_s]
        if not due:
            return []
        last = max(due) if until is None else min(max(due), until)
        num_due = bisect_right(self._waiting, last, key=lambda w: w.key[0])
        groups, self._waiting = self._group(num_due)
        return groups

    def _group(self, num_due: int) -> tuple[list[Group], list[_Waiting]]:
        """(the first `num_due` lines as groups, with later equal ones; the lines that still wait)."""
        due = self._waiting[:num_due]
        if not self._collapses:
            lone = [Group(w.line.time, w.line.text, w.line.is_stamped, [w.source]) for w in due]
            return lone, self._waiting[num_due:]
        groups: list[Group] = []
        seen: dict[object, list[Group]] = {}
        # How many groups with a text a source has joined: its second such line joins the others' second ones.
        passed: dict[object, int] = {}
        left = []
        for i, w in enumerate(self._waiting):
            if i >= num_due and (not due or w.key[0] - due[-1].key[0] > WINDOW_S):
                left += self._waiting[i:]
                break
            # Ranks join only ranks, agents only agents, and lines of one attempt only each other.
            what = (_without_time(w.line.text), w.source.attempt, w.source.node is None, w.source.rank is None)
            open_groups = seen.setdefault(what, []) if i < num_due else seen.get(what, [])
            at = passed.get((what, w.source), 0)
            while at < len(open_groups) and w.key[0] - open_groups[at].time > WINDOW_S:
                at += 1
            if at < len(open_groups):
                open_groups[at].sources.append(w.source)
            elif i < num_due:
                group = Group(w.key[0], w.line.text, w.line.is_stamped, [w.source])
                open_groups.append(group)
                groups.append(group)
            else:
                left.append(w)
                continue
            passed[what, w.source] = at + 1
        return groups, left


def _without_time(text: str) -> str:
    return _GLOG.sub("", text, count=1) if text[:1] in "[IWEF" and _GLOG.match(text) else text
