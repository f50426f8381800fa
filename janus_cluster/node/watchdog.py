"""Detects a hang of a running training, and the rank that causes it, from the ranks' heartbeats.

One hung rank blocks all others: they wait for it in a collective until its time-out of hours. Every rank's file has a
time, written by a thread while the process is alive, and a count of its progress. The times are other nodes' clocks;
only their changes are used, timed by this node's clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.attempt import HangRecord, HeartbeatRecord

_LONGEST_INTERVAL_S = 10.0
# A process this many heartbeats late is taken for dead. NFS may show another node's change late by its attribute
# caches, at most 60 s (acregmax, acdirmax).
_MISSED_BEATS = 3
_CACHE_S = 60.0
# Longer than so many intervals between two looks: the watcher itself was suspended.
_MISSED_LOOKS = 3


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What one rank reported, and when (by the watcher's clock, s) its life and its progress were last seen to change.

    `has_begun`: this rank has reached a step, past the all-reduce that each one begins with.
    """

    rank: int
    node: str
    doing: str
    step: int
    has_begun: bool
    alive_s: float
    progress_s: float


class Watchdog:
    """Reads the heartbeats periodically. Before the first step `start_timeout_s` is the limit.

    Only time in which it could observe counts. While it was suspended itself (a suspended job, a file system that did
    not answer), the ranks were too; while the run folder cannot be written, ranks cannot report progress.
    """

    def __init__(
        self,
        run: RunDir,
        *,
        attempt: int,
        world_size: int,
        hang_timeout_s: float,
        start_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._paths = {rank: run.heartbeat_json(attempt, rank) for rank in range(world_size)}
        self._hang_timeout_s = hang_timeout_s
        self._start_timeout_s = start_timeout_s
        self._interval_s = min(_LONGEST_INTERVAL_S, hang_timeout_s / 4)
        self._clock = clock
        self._last_reported: dict[int, tuple[int, float]] = {}
        self._beats: dict[int, Beat] = {}
        self._looked_s = clock()
        self._seen_s = 0.0

    def look(self, *, is_blind: bool = False) -> HangRecord | None:
        """The hang, once it has lasted too long; None otherwise. Reads the files once per heartbeat.

        is_blind: the run folder cannot be written now.
        """
        elapsed_s = self._clock() - self._looked_s
        if elapsed_s < self._interval_s:
            return None
        self._looked_s += elapsed_s
        was_suspended = elapsed_s > _MISSED_LOOKS * self._interval_s
        self._seen_s += 0.0 if is_blind else self._interval_s if was_suspended else elapsed_s
        now = self._seen_s
        for rank, path in self._paths.items():
            self._read(rank, path, now)
        if not self._beats and now >= self._start_timeout_s:
            return HangRecord(message=f"no progress: no rank has begun in {self._start_timeout_s:.0f} s")
        return judge_progress(
            self._beats,
            now_s=now,
            hang_timeout_s=self._hang_timeout_s,
            start_timeout_s=self._start_timeout_s,
            silence_s=min(_MISSED_BEATS * self._interval_s + _CACHE_S, 0.9 * self._hang_timeout_s),
            missing=[rank for rank in self._paths if rank not in self._beats],
        )

    def _read(self, rank: int, path: Path, now: float) -> None:
        if (record := HeartbeatRecord.load(path)) is None:
            # Not begun, or read between two writes: the last reading is kept.
            return
        reported = record.count, record.time
        alive_s = progress_s = now
        if (last := self._beats.get(rank)) is not None:
            progress_s = now if reported[0] != self._last_reported[rank][0] else last.progress_s
            alive_s = now if reported[1] != self._last_reported[rank][1] else last.alive_s
        self._last_reported[rank] = reported
        self._beats[rank] = Beat(
            rank=rank,
            node=record.node,
            doing=record.doing,
            step=record.step,
            has_begun=record.has_begun,
            alive_s=alive_s,
            progress_s=progress_s,
        )


def judge_progress(
    beats: Mapping[int, Beat],
    *,
    now_s: float,
    hang_timeout_s: float,
    start_timeout_s: float,
    silence_s: float,
    missing: Sequence[int] = (),
) -> HangRecord | None:
    """None while any rank makes progress, or made some within the limit; else which rank caused the hang.

    The ranks that never began (`missing`); without any, the rank whose process gives no sign of life; without one, the
    rank that is behind the others, if there is one.
    """
    if not beats:
        return None
    # The first step begins with an all-reduce: one rank past it proves that all have begun, even if the file of a rank
    # that stopped before its next heartbeat is older.
    is_starting = not any(b.has_begun for b in beats.values())
    limit_s = start_timeout_s if is_starting else hang_timeout_s
    if now_s - max(b.progress_s for b in beats.values()) < limit_s:
        return None
    step = max(b.step for b in beats.values())
    summary = (
        f"no progress of any rank for {limit_s:.0f} s, {'before the first step' if is_starting else f'step {step}'}"
    )
    if missing and is_starting:
        only_rank = missing[0] if len(missing) == 1 else None
        return HangRecord(message=f"{summary}: rank {', '.join(map(str, missing))} never began", rank=only_rank)
    silent = [b for b in beats.values() if now_s - b.alive_s > silence_s]
    if silent and len(silent) < len(beats):
        rows = "; ".join(f"rank {b.rank} on {b.node} gives no sign of life since {b.doing}" for b in silent)
        return HangRecord(message=f"{summary}: {rows}", rank=silent[0].rank, node=_only({b.node for b in silent}))
    # A rank that waits for its data keeps the others waiting, not the other way round.
    places = {b.rank: (b.step, b.doing != "data") for b in beats.values()}
    behind = [b for b in beats.values() if places[b.rank] == min(places.values())]
    if len(behind) == 1:
        only = behind[0]
        return HangRecord(
            message=f"{summary}: rank {only.rank} on {only.node} got no further than {only.doing} of step {only.step}",
            rank=only.rank,
            node=only.node,
        )
    return HangRecord(message=f"{summary}: all ranks are alive and wait")


def _only(names: set[str]) -> str | None:
    return next(iter(names)) if len(names) == 1 else None
