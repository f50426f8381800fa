"""Which rank the others wait for, and in which collective: from what the ranks wrote while training made no progress.

A rank that hangs answers nothing, or has called fewer collectives of a group than the ranks that wait in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.attempt import HeartbeatRecord
from janus_cluster.run.records.stall import (
    MOST_TRACE_BYTES,
    Collective,
    GroupState,
    StallRecord,
    parse_groups,
    parse_trace,
)


@dataclass(frozen=True, kw_only=True)
class Stall:
    """A collective that does not finish. `missing`: the ranks it waits for; none where all have called it.

    frames: of the one missing rank, where it wrote what it was doing.
    """

    message: str
    missing: tuple[int, ...] = ()
    waiting: tuple[int, ...] = ()
    frames: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Wait:
    """One collective of one group, and the ranks that wait in it."""

    group: tuple[str, tuple[int, ...]]
    number: int
    collectives: Mapping[int, Collective]
    missing: tuple[int, ...]


def load_stalls(run: RunDir, *, attempt: int, world_size: int) -> dict[int, StallRecord]:
    """Rank → what it was doing, of the ranks that wrote it and have not got on since.

    A rank without a record of its own has the trace that NCCL's watchdog wrote at its time-out, or nothing.
    """
    found = {}
    for rank in range(world_size):
        beat = HeartbeatRecord.load(run.heartbeat_json(attempt, rank))
        record = StallRecord.load(run.stall_json(attempt, rank)) or _load_trace(run, attempt, rank, beat)
        if record is not None and (beat is None or record.count in (None, beat.count)):
            found[rank] = record
    return found


def _load_trace(run: RunDir, attempt: int, rank: int, beat: HeartbeatRecord | None) -> StallRecord | None:
    path = run.stall_trace(attempt, rank)
    try:
        with path.open("rb") as f:
            groups = parse_groups(parse_trace(f.read(MOST_TRACE_BYTES)))
        written_at = path.stat().st_mtime
    except (OSError, ValueError):
        return None
    return StallRecord(rank=rank, node=beat.node if beat else "", time=written_at, groups=groups)


def judge_stall(
    records: Mapping[int, StallRecord], *, world_size: int, nodes: Mapping[int, str] | None = None
) -> Stall | None:
    """The collective that holds all up, and who is missing in it; None where no rank waits in any.

    nodes: rank → node, also of ranks without a record.
    """
    waits = _find_waits(records, world_size)
    if not waits:
        return None
    places = {rank: record.node for rank, record in records.items()} | dict(nodes or {})
    # Ranks may wait in several groups in a row; the first cause is who is missing in one and waits in no other.
    stuck = {rank for wait in waits for rank in wait.collectives}
    causes = [w for w in waits if any(rank not in stuck for rank in w.missing)]
    wait = max(causes or waits, key=lambda w: (len(w.collectives), -w.number))
    calls = {rank: (c.name, c.sizes if _is_same_on_all(c) else ()) for rank, c in wait.collectives.items()}
    if len(set(calls.values())) > 1:
        return _differing(wait, calls, places)
    missing = tuple(rank for rank in wait.missing if rank not in stuck) or wait.missing
    if missing:
        return _missing(wait, missing, records, places)
    return _unfinished(wait, places)


def _find_waits(records: Mapping[int, StallRecord], world_size: int) -> list[_Wait]:
    states: dict[tuple[str, tuple[int, ...]], dict[int, GroupState]] = {}
    for rank, record in records.items():
        for group in record.groups:
            key = group.name, group.ranks or tuple(range(world_size))
            states.setdefault(key, {})[rank] = group
    found = []
    for key, by_rank in states.items():
        for number in sorted({s.waits_in.number for s in by_rank.values() if s.waits_in is not None}):
            waiting = {r: s.waits_in for r, s in by_rank.items() if s.waits_in and s.waits_in.number == number}
            missing = tuple(r for r in key[1] if r not in by_rank or by_rank[r].last_number < number)
            found.append(_Wait(group=key, number=number, collectives=waiting, missing=missing))
    return found


def _is_same_on_all(collective: Collective) -> bool:
    """Whether every rank of the group calls it with tensors of the same sizes."""
    return not collective.name.startswith(("all_to_all", "alltoall", "scatter", "gather", "broadcast"))


def _apart(values: Mapping[int, object]) -> tuple[tuple[int, ...], bool]:
    """The ranks whose value is not the most frequent one, and whether that is one of a clear majority."""
    counts = Counter(values.values()).most_common(2)
    ranks = tuple(rank for rank, value in values.items() if value != counts[0][0])
    return ranks, len(counts) > 1 and counts[0][1] > counts[1][1]


def _missing(
    wait: _Wait, missing: Sequence[int], records: Mapping[int, StallRecord], places: Mapping[int, str]
) -> Stall:
    collective = next(iter(wait.collectives.values()))
    waiting = tuple(sorted(wait.collectives))
    verb = "waits" if len(waiting) == 1 else "wait"
    message = (
        f"{describe_ranks(missing, places)} did not join {collective.describe()}, "
        f"in which {describe_ranks(waiting, {})} {verb}"
    )
    only = records.get(missing[0]) if len(missing) == 1 else None
    if only is not None and only.doing:
        message += f"; it is in {only.doing} of step {only.step}"
    elif len(missing) == 1:
        message += "; it gave no answer"
    return Stall(
        message=message, missing=tuple(missing), waiting=waiting, frames=only.frames if only is not None else ()
    )


def _differing(wait: _Wait, calls: Mapping[int, object], places: Mapping[int, str]) -> Stall:
    """Of two ranks that call two different collectives, neither is to blame."""
    ranks, is_majority = _apart(calls)
    others = tuple(sorted(r for r in wait.collectives if r not in ranks))
    message = (
        f"{describe_ranks(ranks, places)} called {wait.collectives[ranks[0]].describe()} where "
        f"{describe_ranks(others, {})} called {wait.collectives[others[0]].describe()}"
    )
    return Stall(message=message, missing=ranks if is_majority else (), waiting=others)


def _unfinished(wait: _Wait, places: Mapping[int, str]) -> Stall:
    """All have called it. On GPUs a rank whose stream has not come to it holds up the ones that have begun."""
    waiting = tuple(sorted(wait.collectives))
    collective = wait.collectives[waiting[0]].describe()
    behind = tuple(rank for rank in waiting if wait.collectives[rank].state != "started")
    if 0 < len(behind) < len(waiting):
        begun = tuple(rank for rank in waiting if rank not in behind)
        whose = "its GPU has" if len(behind) == 1 else "their GPUs have"
        message = (
            f"{describe_ranks(behind, places)} called {collective}, but {whose} not begun it; "
            f"{describe_ranks(begun, {})} did"
        )
        return Stall(message=message, missing=behind, waiting=begun)
    return Stall(message=f"{describe_ranks(waiting, {})} joined {collective}, and it does not finish", waiting=waiting)


def describe_ranks(ranks: Iterable[int], places: Mapping[int, str]) -> str:
    """ "rank 3 on node-2", "ranks 0–2, 4–7"; the node where all are on one."""
    found = sorted(ranks)
    spans: list[list[int]] = []
    for rank in found:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    numbers = ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in spans)
    nodes = {places.get(rank) or "" for rank in found}
    node = f" on {next(iter(nodes))}" if len(nodes) == 1 and "" not in nodes else ""
    return f"{'rank' if len(found) == 1 else 'ranks'} {numbers}{node}"
