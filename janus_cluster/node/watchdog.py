"""Finds the standstill of a training that still runs, and the rank that stands still, from the ranks' heartbeats.

A hung rank takes all others with it: they wait for it in a collective until the time-out of hours. Every rank's file
tells two things: that its process lives (a thread of its own writes it) and how often its training got on. The times in
the files are other nodes' clocks; only their changes are looked at, by this node's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from janus_cluster.rundir import RunDir, read_json

_LONGEST_INTERVAL_S = 10.0
# So many heartbeats late, a process does not live. NFS may show another node's change late by its attribute caches,
# whose longest time is 60 s (acregmax, acdirmax).
_MISSED_BEATS = 3
_CACHE_S = 60.0
# Longer than so many intervals between two looks, the watcher itself stood still.
_MISSED_LOOKS = 3


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What one rank told, and when (by the watcher's clock, s) its life and its progress were last seen to change.

    `has_begun`: this rank has been at a step, past the reduction over all ranks that each one begins with.
    """

    rank: int
    node: str
    doing: str
    step: int
    has_begun: bool
    alive_s: float
    progress_s: float


@dataclass(frozen=True, kw_only=True)
class Hang:
    """Training stands still. `rank` and `node` are None where no single one can be named."""

    message: str
    rank: int | None = None
    node: str | None = None


class Watchdog:
    """Looks at the heartbeats now and then. Before the first step `start_timeout_s` is the limit.

    Its time is that in which it could see. Where it stood still itself (a suspended job, a file system that did not
    answer), the ranks did, too; and where nobody can write the run folder, training that gets on cannot say so.
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
        self._told: dict[int, tuple[int, float]] = {}
        self._beats: dict[int, Beat] = {}
        self._looked_s = clock()
        self._seen_s = 0.0

    def look(self, *, is_blind: bool = False) -> Hang | None:
        """The standstill, once it has lasted too long; None otherwise. Reads the files once in a heartbeat.

        is_blind: the run folder cannot be written now.
        """
        elapsed_s = self._clock() - self._looked_s
        if elapsed_s < self._interval_s:
            return None
        self._looked_s += elapsed_s
        stood_still = elapsed_s > _MISSED_LOOKS * self._interval_s
        self._seen_s += 0.0 if is_blind else self._interval_s if stood_still else elapsed_s
        now = self._seen_s
        for rank, path in self._paths.items():
            self._read(rank, path, now)
        if not self._beats and now >= self._start_timeout_s:
            return Hang(message=f"no progress: no rank has begun in {self._start_timeout_s:.0f} s")
        return judge_progress(
            self._beats,
            now_s=now,
            hang_timeout_s=self._hang_timeout_s,
            start_timeout_s=self._start_timeout_s,
            silence_s=min(_MISSED_BEATS * self._interval_s + _CACHE_S, 0.9 * self._hang_timeout_s),
            missing=[rank for rank in self._paths if rank not in self._beats],
        )

    def _read(self, rank: int, path: Path, now: float) -> None:
        try:
            value = read_json(path)
            told = int(value["count"]), float(value["time"])
            node, doing, step = str(value["node"]), str(value["doing"]), int(value["step"])
            has_begun = bool(value["has_begun"])
        except (OSError, ValueError, KeyError, TypeError):
            # Not begun, or caught between two writes: what was seen before stands.
            return
        alive_s = progress_s = now
        if (last := self._beats.get(rank)) is not None:
            progress_s = now if told[0] != self._told[rank][0] else last.progress_s
            alive_s = now if told[1] != self._told[rank][1] else last.alive_s
        self._told[rank] = told
        self._beats[rank] = Beat(
            rank=rank,
            node=node,
            doing=doing,
            step=step,
            has_begun=has_begun,
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
) -> Hang | None:
    """None while any rank gets on, or not long enough ago; else who is to blame for the standstill.

    The ranks that never began (`missing`); without any, the rank whose process gives no sign of life; without one, the
    rank that is behind the others, if there is one.
    """
    if not beats:
        return None
    # The first step begins with a reduction over all ranks: one rank past it tells that all have begun, whatever the
    # file of a rank says that fell silent before its next heartbeat.
    is_starting = not any(b.has_begun for b in beats.values())
    limit_s = start_timeout_s if is_starting else hang_timeout_s
    if now_s - max(b.progress_s for b in beats.values()) < limit_s:
        return None
    step = max(b.step for b in beats.values())
    said = f"no progress of any rank for {limit_s:.0f} s, {'before the first step' if is_starting else f'step {step}'}"
    if missing and is_starting:
        only_rank = missing[0] if len(missing) == 1 else None
        return Hang(message=f"{said}: rank {', '.join(map(str, missing))} never began", rank=only_rank)
    silent = [b for b in beats.values() if now_s - b.alive_s > silence_s]
    if silent and len(silent) < len(beats):
        rows = "; ".join(f"rank {b.rank} on {b.node} gives no sign of life since {b.doing}" for b in silent)
        return Hang(message=f"{said}: {rows}", rank=silent[0].rank, node=_only({b.node for b in silent}))
    # Who waits for its data keeps the others waiting, not the other way round.
    places = {b.rank: (b.step, b.doing != "data") for b in beats.values()}
    behind = [b for b in beats.values() if places[b.rank] == min(places.values())]
    if len(behind) == 1:
        only = behind[0]
        return Hang(
            message=f"{said}: rank {only.rank} on {only.node} got no further than {only.doing} of step {only.step}",
            rank=only.rank,
            node=only.node,
        )
    return Hang(message=f"{said}: all ranks live and wait")


def _only(names: set[str]) -> str | None:
    return next(iter(names)) if len(names) == 1 else None
