"""Check a job's data before it is queued: python -m janus_cluster.janusvln.data.desk

Stdin: the job's `data` as JSON. Stdout: {"lines", "warnings"}, or {"error", "hint"} where training could not begin. Of
every root the layout and the absent trajectories are judged as a whole, and a few episodes are read as for training.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from janus_cluster.errors import JanusError
from janus_cluster.janusvln.data.formats import trajectories
from janus_cluster.janusvln.data.formats.records import kind_of
from janus_cluster.janusvln.data.formats.registry import FORMATS, resolve_source
from janus_cluster.janusvln.data.formats.source import BadUnitError, Source
from janus_cluster.janusvln.data.index import judge_absent, nothing_usable, problem_lines
from janus_cluster.janusvln.data.remedies import find_remedies
from janus_cluster.janusvln.data.samples import Problem
from janus_cluster.janusvln.data.store import Collector, Store
from janus_cluster.janusvln.data.usable import judge_samples
from janus_cluster.job.schema import Data, Root

# Read of each root, drawn the same way every time: about 3,000 frames, whose headers take a few seconds on a cold disk.
UNITS_READ = 48


@dataclass(frozen=True, slots=True)
class Look:
    """Lines on what was found, and warnings."""

    lines: list[str]
    warnings: list[str]


def look_at_data(data: Data) -> Look:
    """What is known of the data before training. Raises: UsageError where training would be refused for certain."""
    look = Look([], [])
    for root in data.roots:
        _look_at_root(root, data, look)
    return look


def _look_at_root(root: Root, data: Data, look: Look) -> None:
    source = resolve_source(root, data)
    absent: list[Problem] = []
    units = FORMATS[source.format].list_units(source)
    read, num_present = _draw(units if source.format == "episodes" else _present(source, units, absent))
    if line := judge_absent(source, absent, num_present=num_present, data=data):
        look.warnings.append(f"data: {line}")
    collector = Collector(decode_images=data.verify_images == "decode")
    for unit in read:
        FORMATS[source.format].read_unit(source, unit, collector)
    store = Store(collector.columns())
    good, unusable = judge_samples(store, data, pad_history=False)
    problems = [*store.problems, *unusable]
    if not good.any():
        raise nothing_usable(source, problems)
    num_bad = sum(problem.lost for problem in problems)
    what = "episodes" if source.format == "episodes" else "records"
    few = f"{len(read)} of {num_present:,} {what}" if len(read) < num_present else f"all {len(read)} {what}"
    look.lines.append(f"data: {source.path}: {int(good.sum()):,} samples of {few} read, {num_bad:,} cannot be used")
    if num_bad:
        share = num_bad / (num_bad + int(good.sum()))
        listed = [*problem_lines(problems, num_bad), *find_remedies(problems, [source.frames])]
        look.warnings.append("\n".join([f"data: {source.path}: {_policy(share, data)}", *listed]))


def _policy(share: float, data: Data) -> str:
    """What data.on_bad does with a share of bad samples."""
    text = f"{share:.1%} of the samples read cannot be used"
    if data.on_bad == "fail":
        return f"{text}, and data.on_bad is fail; --set data.on_bad=skip leaves them out"
    if share <= data.max_bad_fraction:
        return f"{text}: left out"
    enough = min(1.0, share + 0.005)
    return (
        f"{text}, and data.max_bad_fraction is {data.max_bad_fraction:g}: training is refused if it is so of all; mend "
        f"them, or --set data.max_bad_fraction={enough:.2f}"
    )


def _draw(units: Iterable[Any]) -> tuple[list[Any], int]:
    """UNITS_READ units, each as likely as any other and the same every time, and how many there are."""
    drawn: list[Any] = []
    generator = random.Random(0)
    count = 0
    for count, unit in enumerate(units, 1):
        if len(drawn) < UNITS_READ:
            drawn.append(unit)
        elif (place := generator.randrange(count)) < UNITS_READ:
            drawn[place] = unit
    return drawn, count


def _present(source: Source, units: Iterable[Any], absent: list[Problem]) -> Iterator[Any]:
    """All records but trajectories without a folder of frames, which are put to `absent`.

    A folder is listed once, not asked for each.
    """
    listings: dict[Path, frozenset[str] | None] = {}
    for unit in units:
        _, record = unit
        folders: tuple[Path, ...] = ()
        # What is no record is reported where it is read.
        with suppress(BadUnitError):
            if isinstance(record, Mapping) and kind_of(record, source.format).name == "trajectories":
                folders = trajectories.folders_of(source, record)
        if folders and not any(_is_listed(folder, listings) for folder in folders):
            absent.append(Problem(folders[0], "is absent", kind="absent", detail=trajectories.language_of(record)))
        else:
            yield unit


def _is_listed(folder: Path, listings: dict[Path, frozenset[str] | None]) -> bool:
    """Whether there is anything of that name. True where it cannot be checked: that is no sign of absence."""
    parent = folder.parent
    if parent not in listings:
        try:
            with os.scandir(parent) as entries:
                listings[parent] = frozenset(entry.name for entry in entries)
        except (FileNotFoundError, NotADirectoryError):
            listings[parent] = frozenset()
        except OSError:
            listings[parent] = None
    names = listings[parent]
    return names is None or folder.name in names


def main() -> None:
    """The answer is printed; a refusal is an answer too."""
    try:
        look = look_at_data(Data.model_validate_json(sys.stdin.read()))
        answer: dict[str, Any] = {"lines": look.lines, "warnings": look.warnings}
    except JanusError as error:
        answer = {"error": error.message, "hint": error.hint}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
