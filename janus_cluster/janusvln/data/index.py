"""Roots of the job file -> the samples to train on and the ones held out, and a list of what could not be used."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from janus_cluster.errors import UsageError
from janus_cluster.janusvln.data.formats.registry import resolve_sources
from janus_cluster.janusvln.data.formats.source import Source
from janus_cluster.janusvln.data.indexing import Reporter, Share, load_stores
from janus_cluster.janusvln.data.remedies import find_remedies
from janus_cluster.janusvln.data.samples import Problem
from janus_cluster.janusvln.data.split import EarlierSplit, HeldOut, hold_out
from janus_cluster.janusvln.data.store import Store
from janus_cluster.janusvln.data.table import Indices, SampleTable
from janus_cluster.janusvln.data.usable import judge_samples
from janus_cluster.job.schema import Data
from janus_cluster.run.records.training import BadDataRecord, write_bad_data

PROBLEMS_SHOWN = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleSplit:
    """Samples to train on and held out, and everything that could not be used. `num_bad` samples were lost by the
    problems, and `absent` lists each root with trajectories without frames, and how many there are.
    """

    train: SampleTable
    held_out: SampleTable
    split: HeldOut
    problems: tuple[Problem, ...]
    num_bad: int
    absent: tuple[str, ...] = ()

    def describe(self) -> str:
        """Lines for a log: how many samples and episodes, and the first problems."""
        counts = ", ".join(
            f"{name} {len(samples)} samples of {_count_episodes(samples)} episodes"
            for name, samples in (("training", self.train), ("held out", self.held_out))
        )
        return "\n".join([counts, self.split.describe(), *self.absent, *problem_lines(self.problems, self.num_bad)])


def load_samples(
    data: Data,
    *,
    seed: int,
    pad_history: bool = False,
    index_dir: Path | None = None,
    share: Share | None = None,
    bad_data: Path | None = None,
    reporter: Reporter | None = None,
    earlier: EarlierSplit | None = None,
) -> SampleSplit:
    """Every usable sample under `data.roots`, split by walk or as in `earlier`; the same on every rank.

    The index of each root is kept in `index_dir` (default: data.index_dir; without either nothing is kept). With
    `share` only one rank reads the data. `bad_data`: the file that lists whatever could not be used, written by the
    rank that builds, before the policy is applied.
    Raises: UsageError if nothing usable is found, more is bad than data.on_bad and data.max_bad_fraction allow, or more
    trajectories of a root have no frames than data.max_absent_fraction allows.
    """
    if not data.roots:
        raise UsageError("data.roots is empty", hint="name one or more data sets in data.roots")
    sources = resolve_sources(data)
    reporter = reporter or Reporter()
    if index_dir is None and data.index_dir is not None:
        index_dir = Path(data.index_dir)
    stores = load_stores(sources, index_dir=index_dir, share=share, reporter=reporter)
    absent = [
        judge_absent(
            source,
            [problem for problem in store.problems if problem.absent],
            num_present=len(store.column("episode_name")),
            data=data,
        )
        for source, store in zip(sources, stores, strict=True)
    ]
    table, problems = _usable_table(sources, stores, data, seed=seed, pad_history=pad_history)
    num_bad = sum(problem.lost for problem in problems)
    if bad_data is not None and (share is None or share.is_builder):
        write_bad_data(bad_data, list_bad_data(problems))
    _apply_policy(table, problems, num_bad, data, sources, listed=bad_data)
    outcome: Any = None
    if share is None or share.is_builder:
        outcome = hold_out(table, fraction=data.validation_fraction, seed=seed, earlier=earlier)
    mask, chosen = outcome if share is None else share.broadcast(outcome)
    return SampleSplit(
        train=table.select(~mask),
        held_out=table.select(mask),
        split=chosen,
        problems=tuple(problems),
        num_bad=num_bad,
        absent=tuple(filter(None, absent)),
    )


def list_bad_data(problems: Sequence[Problem]) -> list[BadDataRecord]:
    """A record for each problem; trajectories without frames come last, marked as absent."""
    return [
        BadDataRecord(path=str(p.path), reason=p.reason, samples_lost=p.lost, absent=bool(p.absent))
        for p in sorted(problems, key=lambda p: p.absent)
    ]


def judge_absent(source: Source, absent: Sequence[Problem], *, num_present: int, data: Data) -> str:
    """A line on the trajectories that have no folder of frames, empty where all have one.

    Raises: UsageError if there are more than data.max_absent_fraction allows, or none has one.
    """
    if not absent:
        return ""
    total = len(absent) + num_present
    languages = Counter(problem.detail for problem in absent if problem.detail)
    of_languages = ", ".join(f"{name} {count:,}" for name, count in languages.most_common())
    line = (
        f"{source.path}: {len(absent):,} of {total:,} trajectories ({len(absent) / total:.1%}) have no folder of "
        f"frames under {source.frames}{f' ({of_languages})' if languages else ''}"
    )
    if num_present and len(absent) <= data.max_absent_fraction * total:
        return f"{line}: not rendered, left out"
    hint = "name the folder that holds them: {path: …, images: …} in data.roots"
    if num_present:
        line += f", and data.max_absent_fraction is {data.max_absent_fraction:g}"
        enough = math.ceil(100 * len(absent) / total) / 100
        hint = f"if no more was rendered: --set data.max_absent_fraction={enough:.2f}; or {hint}"
    raise UsageError(f"{line}\n  the first of them: {absent[0].path}", hint=hint)


def _usable_table(
    sources: Sequence[Source], stores: Sequence[Store], data: Data, *, seed: int, pad_history: bool
) -> tuple[SampleTable, list[Problem]]:
    roots: list[Indices] = []
    rows: list[Indices] = []
    problems: list[Problem] = []
    for number, (root, source, store) in enumerate(zip(data.roots, sources, stores, strict=True)):
        good, unusable = judge_samples(store, data, pad_history=pad_history)
        own = [*store.problems, *unusable]
        if not good.any():
            raise nothing_usable(source, own)
        rows.append(draw_part(np.flatnonzero(good), root.fraction, seed=seed, root=number))
        roots.append(np.full(len(rows[-1]), number, dtype=np.int64))
        problems += own
    table = SampleTable(
        stores=tuple(stores),
        root_index=np.concatenate(roots),
        rows=np.concatenate(rows),
        max_history=data.history,
        pad_history=pad_history,
    )
    return table, problems


def draw_part(rows: Indices, fraction: float, *, seed: int, root: int) -> Indices:
    """A share of the rows, one at least, the same for the same seed. Shapes: [N] -> [max(1, round(N * fraction))]."""
    if fraction == 1 or not len(rows):
        return rows
    wanted = max(1, round(len(rows) * fraction))
    return np.sort(np.random.default_rng([seed, root]).choice(rows, wanted, replace=False))


def _count_episodes(table: SampleTable) -> int:
    """Episodes of one name in one root are one: a record may be a single sample."""
    numbers: list[int] = np.unique(table.episode_numbers()).tolist()
    names = [store.episode_names() for store in table.stores]
    return len({(number >> 32, names[number >> 32][number & 0xFFFFFFFF]) for number in numbers})


def _apply_policy(
    table: SampleTable,
    problems: Sequence[Problem],
    num_bad: int,
    data: Data,
    sources: Sequence[Source],
    *,
    listed: Path | None,
) -> None:
    total = num_bad + len(table)
    where = "" if listed is None else f"; all are listed in {listed}"
    if num_bad and data.on_bad == "fail":
        policy = "data.on_bad is fail"
        hint = f"mend them, or skip them with --set data.on_bad=skip{where}"
    elif num_bad > data.max_bad_fraction * total:
        policy = f"data.max_bad_fraction is {data.max_bad_fraction:g}"
        enough = min(1.0, num_bad / total + 0.005)
        hint = f"mend them, or allow more with --set data.max_bad_fraction={enough:.2f}{where}"
    else:
        return
    lines = [f"{num_bad} of {total} samples cannot be used ({num_bad / total:.2%}), and {policy}"]
    remedies = find_remedies(problems, [source.frames for source in sources])
    raise UsageError("\n".join([*lines, *problem_lines(problems, num_bad), *remedies]), hint=hint)


def problem_lines(problems: Sequence[Problem], num_bad: int) -> list[str]:
    """How many problems there are, and the first of them."""
    problems = [problem for problem in problems if not problem.absent]
    if not problems:
        return []
    shown = sorted(problems, key=lambda p: p.lost == 0)[:PROBLEMS_SHOWN]
    lines = [f"{len(problems)} problems in the data, {num_bad} samples lost:", *(f"  {p}" for p in shown)]
    if len(problems) > PROBLEMS_SHOWN:
        lines.append(f"  … and {len(problems) - PROBLEMS_SHOWN} more")
    return lines


def nothing_usable(source: Source, problems: Sequence[Problem]) -> UsageError:
    """The error for a root of which no sample can be used."""
    lines = [f"no usable sample under {source.path}"]
    lines += problem_lines(problems, sum(p.lost for p in problems)) or ["there is nothing in it"]
    lines += find_remedies(problems, [source.frames])
    return UsageError(
        "\n".join(lines),
        hint="docs/data.md shows every format; an episode folder holds milestones_result.json, step_0000_ACTION.png "
        "and step_0000_ACTION.json",
    )
