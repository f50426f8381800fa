"""The episode-folder format.

    <root>/<episode>/milestones_result.json   {"instruction_text", "subinstructions", "completion_checkpoints"}
    <root>/<episode>/step_0006_TURN_LEFT.png  one frame and the action taken there (png, jpg or jpeg)
    <root>/<episode>/step_0006_TURN_LEFT.json {"landmark_description", "spatial_description"}

An episode without sub-instructions is trained on with an empty SUBINSTRUCTION line, as by the predecessor. A frame
without descriptions or with an unknown action makes no sample of its own, but later frames still show it as history.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from janus_cluster.errors import UsageError
from janus_cluster.janusvln.data.formats.source import (
    ODD_SUFFIX,
    BadUnitError,
    Record,
    Source,
    UnknownActionError,
    has_odd_suffix,
    load_json_object,
)
from janus_cluster.janusvln.data.formats.walks import walk_keys
from janus_cluster.janusvln.data.samples import judge_text
from janus_cluster.janusvln.data.store import Collector

MILESTONES_NAME = "milestones_result.json"
FRAME_NAME = re.compile(r"^step_(\d+)_([A-Za-z_]+)\.(png|jpg|jpeg)$", re.ASCII)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
DESCRIPTION_KEYS = ("landmark_description", "spatial_description")


@dataclass(frozen=True, slots=True)
class Milestones:
    """What was asked. Sub-instruction i covers the frames up to and including checkpoint i."""

    instruction: str
    subinstructions: tuple[str, ...]
    checkpoints: tuple[int, ...]
    walk_keys: tuple[str, ...] = ()

    def subinstruction_at(self, step_number: int) -> str:
        """The sub-instruction of a frame: the one after the last checkpoint before it; empty without any."""
        if not self.subinstructions:
            return ""
        return self.subinstructions[min(bisect_left(self.checkpoints, step_number), len(self.subinstructions) - 1)]


class FolderNames:
    """The names of all episodes' folders."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._num_read = 0

    def __iter__(self) -> Iterator[str]:
        for name in self.names:
            self._num_read += 1
            yield name

    def share_read(self) -> float:
        """How much has been iterated over, 0 to 1."""
        return min(1.0, self._num_read / max(1, len(self.names)))


class EpisodeFolders:
    """A unit is the name of an episode's folder."""

    def list_units(self, source: Source) -> FolderNames:
        """The folders under the root by name; hidden ones are none."""
        root = source.path
        if (root / MILESTONES_NAME).is_file():
            raise UsageError(
                f"data.roots: {root} is an episode, expected a folder of episodes",
                hint=f"give its parent: {root.parent}",
            )
        with os.scandir(root) as entries:
            return FolderNames(sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(".")))

    def read_unit(self, source: Source, unit: str, collector: Collector) -> None:
        """The episode's usable steps are samples."""
        folder = source.path / unit
        try:
            frames = _list_frames(folder, collector)
            try:
                milestones = _load_milestones(folder / MILESTONES_NAME, unit, collector)
            except BadUnitError as error:
                collector.problem(folder / MILESTONES_NAME, str(error), lost=max(1, len(frames)))
                return
            if not frames:
                raise BadUnitError("holds no step_<number>_<ACTION>.png|jpg|jpeg")
        except (BadUnitError, OSError) as error:
            collector.problem(folder, str(error), lost=1)
            return
        _add_steps(source, unit, frames, milestones, collector)


def _add_steps(
    source: Source,
    name: str,
    frames: Sequence[tuple[int, Path, str]],
    milestones: Milestones,
    collector: Collector,
) -> None:
    episode = collector.episode(name, milestones.walk_keys)
    sequence = collector.sequence([image for _, image, _ in frames])
    for position, (number, image, action_name) in enumerate(frames):
        described = image.with_suffix(".json")
        try:
            action = source.parse_action(action_name)
            texts = _descriptions(load_json_object(described))
        except UnknownActionError as error:
            collector.unknown_action(image, error.spelling)
            continue
        except BadUnitError as error:
            collector.problem(described, str(error), lost=1)
            continue
        collector.sample(
            id=f"{name}/{image.name}",
            episode=episode,
            instruction=milestones.instruction,
            action=action,
            sequence=sequence,
            position=position,
            texts=(milestones.subinstruction_at(number), *texts),
        )


def _load_milestones(path: Path, name: str, collector: Collector) -> Milestones:
    raw = load_json_object(path)
    instruction = raw.get("instruction_text")
    parts = raw.get("subinstructions") or []
    if not isinstance(instruction, str) or not instruction.strip():
        raise BadUnitError("instruction_text is missing or empty")
    if not isinstance(parts, list) or not all(isinstance(p, str) and p.strip() for p in parts):
        raise BadUnitError("subinstructions must be a list of texts")
    if reason := judge_text(instruction, *parts):
        raise BadUnitError(reason)
    checkpoints = _parse_checkpoints(raw.get("completion_checkpoints", []), path, collector)
    if len(parts) > len(checkpoints) + 1:
        counts = f"{len(parts)} subinstructions but {len(checkpoints)} checkpoints"
        collector.problem(path, f"{counts}: the last {len(parts) - len(checkpoints) - 1} cover no frame")
    keys = walk_keys(raw, names=(name,))
    return Milestones(instruction.strip(), tuple(p.strip() for p in parts), checkpoints, tuple(keys))


def _parse_checkpoints(raw: object, path: Path, collector: Collector) -> tuple[int, ...]:
    """Frame numbers in ascending order; entries that hold none are problems."""
    if not isinstance(raw, list):
        collector.problem(path, "completion_checkpoints must be a list")
        return ()
    numbers = []
    for position, entry in enumerate(raw):
        value = entry.get("checkpoint_frame_index") if isinstance(entry, dict) else None
        if isinstance(value, str) and value.strip().isdecimal() and len(value) < 20:
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            numbers.append(value)
        else:
            collector.problem(path, f"completion_checkpoints[{position}] has no checkpoint_frame_index")
    return tuple(sorted(numbers))


def _list_frames(folder: Path, collector: Collector) -> list[tuple[int, Path, str]]:
    """(number, image, action name) by number. Raises: BadUnitError where two files claim one number."""
    frames: dict[int, tuple[Path, str]] = {}
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries)
    for name in names:
        match = FRAME_NAME.match(name)
        if match is None:
            if has_odd_suffix(name, FRAME_NAME):
                collector.problem(folder / name, ODD_SUFFIX, lost=1)
            elif name.startswith("step_") and name.lower().endswith(IMAGE_SUFFIXES):
                collector.problem(folder / name, "is no step_<number>_<ACTION>.png|jpg|jpeg", lost=1)
            continue
        number = int(match[1])
        if number in frames:
            raise BadUnitError(f"{frames[number][0].name} and {name} are both step {number}")
        frames[number] = (folder / name, match[2])
    numbers = sorted(frames)
    if gap := next((n + 1 for n, following in pairwise(numbers) if following != n + 1), None):
        collector.problem(folder, f"step {gap} is missing between steps {numbers[0]} and {numbers[-1]}")
    return [(number, *frames[number]) for number in numbers]


def _descriptions(raw: Record) -> tuple[str, str]:
    """What is seen, in 2D and in 3D; of a list the first text."""
    texts = []
    for key in DESCRIPTION_KEYS:
        value = raw.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        texts.append(value.strip() if isinstance(value, str) else "")
    missing = [key for key, text in zip(DESCRIPTION_KEYS, texts, strict=True) if not text]
    if missing:
        raise BadUnitError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing or empty")
    if reason := judge_text(*texts):
        raise BadUnitError(reason)
    return texts[0], texts[1]
