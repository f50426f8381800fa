"""The episode-folder format.

    <root>/<episode>/milestones_result.json   {"instruction_text", "subinstructions", "completion_checkpoints"}
    <root>/<episode>/step_0006_TURN_LEFT.png  one frame and the action taken there (png, jpg or jpeg)
    <root>/<episode>/step_0006_TURN_LEFT.json {"landmark_description", "spatial_description"}

What cannot be used is never skipped in silence: it becomes a Problem. A frame without descriptions or with an unknown
action makes no sample of its own, but later frames still show it as history.
"""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from janus_cluster.training.data.history import history_positions
from janus_cluster.training.data.samples import ACTIONS, Problem, Sample, find_control_text, parse_action

MILESTONES_NAME = "milestones_result.json"
FRAME_NAME = re.compile(r"^step_(\d+)_([A-Za-z_]+)\.(png|jpg|jpeg)$")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One frame. A usable step has an action and both descriptions; the others are history only."""

    number: int
    image: Path
    action: int | None
    description_2d: str
    description_3d: str
    subinstruction: str

    @property
    def usable(self) -> bool:
        return self.action is not None and bool(self.description_2d) and bool(self.description_3d)


@dataclass(frozen=True, kw_only=True, slots=True)
class Episode:
    """One walk, its frames in the order of their numbers."""

    name: str
    path: Path
    instruction: str
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Milestones:
    """What was asked. Sub-instruction i covers the frames up to and including checkpoint i."""

    instruction: str
    subinstructions: tuple[str, ...]
    checkpoints: tuple[int, ...]

    def subinstruction_at(self, step_number: int) -> str:
        """The sub-instruction of a frame: the one after the last checkpoint that lies before it."""
        return self.subinstructions[min(bisect_left(self.checkpoints, step_number), len(self.subinstructions) - 1)]


def load_episodes(root: Path) -> tuple[list[Episode], list[Problem]]:
    """Every usable episode folder under `root` by name, and everything that was wrong."""
    episodes: list[Episode] = []
    problems: list[Problem] = []
    with os.scandir(root) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    for name in names:
        episode = load_episode(root / name, problems)
        if episode is not None:
            episodes.append(episode)
    return episodes, problems


def load_episode(folder: Path, problems: list[Problem]) -> Episode | None:
    """One episode, or None; what was wrong is appended to `problems` either way."""
    milestones = _load_milestones(folder / MILESTONES_NAME, problems)
    if milestones is None:
        return None
    frames = _list_frames(folder, problems)
    if not frames:
        return None
    steps = tuple(_load_step(number, image, action, milestones, problems) for number, image, action in frames)
    return Episode(name=folder.name, path=folder, instruction=milestones.instruction, steps=steps)


def episode_samples(episode: Episode, *, max_history: int, pad_history: bool = False) -> Iterator[Sample]:
    """One sample for each usable step of the episode."""
    for position, step in enumerate(episode.steps):
        if step.action is None or not step.usable:
            continue
        shown = history_positions(position, max_history, pad=pad_history)
        yield Sample(
            id=f"{episode.name}/{step.image.name}",
            episode=episode.name,
            instruction=episode.instruction,
            subinstruction=step.subinstruction,
            description_2d=step.description_2d,
            description_3d=step.description_3d,
            action=step.action,
            frames=tuple(episode.steps[p].image for p in shown),
        )


def _load_json_object(path: Path, problems: list[Problem]) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(Problem(path, "is missing"))
        return None
    except (OSError, ValueError) as error:
        problems.append(Problem(path, f"cannot be read as JSON ({error})"))
        return None
    if not isinstance(value, dict):
        problems.append(Problem(path, f"holds a {type(value).__name__}, expected an object"))
        return None
    return value


def _load_milestones(path: Path, problems: list[Problem]) -> Milestones | None:
    raw = _load_json_object(path, problems)
    if raw is None:
        return None
    instruction = raw.get("instruction_text")
    parts = raw.get("subinstructions")
    if not isinstance(instruction, str) or not instruction.strip():
        problems.append(Problem(path, "instruction_text is missing or empty"))
        return None
    if not isinstance(parts, list) or not parts or not all(isinstance(p, str) and p.strip() for p in parts):
        problems.append(Problem(path, "subinstructions must be a list of one or more texts"))
        return None
    if control := find_control_text(instruction, *parts):
        problems.append(Problem(path, f"holds the control token {control}"))
        return None
    checkpoints = _parse_checkpoints(raw.get("completion_checkpoints", []), path, problems)
    if len(parts) > len(checkpoints) + 1:
        counts = f"{len(parts)} subinstructions but {len(checkpoints)} checkpoints"
        problems.append(Problem(path, f"{counts}: the last {len(parts) - len(checkpoints) - 1} cover no frame"))
    return Milestones(instruction.strip(), tuple(p.strip() for p in parts), checkpoints)


def _parse_checkpoints(raw: object, path: Path, problems: list[Problem]) -> tuple[int, ...]:
    """Frame numbers in ascending order; entries that hold none are problems."""
    if not isinstance(raw, list):
        problems.append(Problem(path, "completion_checkpoints must be a list"))
        return ()
    numbers = []
    for position, entry in enumerate(raw):
        value = entry.get("checkpoint_frame_index") if isinstance(entry, dict) else None
        if isinstance(value, str) and value.strip().isdecimal():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            numbers.append(value)
        else:
            problems.append(Problem(path, f"completion_checkpoints[{position}] has no checkpoint_frame_index"))
    return tuple(sorted(numbers))


def _list_frames(folder: Path, problems: list[Problem]) -> list[tuple[int, Path, str]]:
    """(number, image, action name) by number; empty where two files claim one number."""
    frames: dict[int, tuple[Path, str]] = {}
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries)
    for name in names:
        match = FRAME_NAME.match(name)
        if match is None:
            if name.startswith("step_") and name.lower().endswith(IMAGE_SUFFIXES):
                problems.append(Problem(folder / name, "is no step_<number>_<ACTION>.png|jpg|jpeg"))
            continue
        number = int(match[1])
        if number in frames:
            problems.append(Problem(folder, f"{frames[number][0].name} and {name} are both step {number}"))
            return []
        frames[number] = (folder / name, match[2])
    if not frames:
        problems.append(Problem(folder, "holds no step_<number>_<ACTION>.png|jpg|jpeg"))
    return [(number, *frames[number]) for number in sorted(frames)]


def _load_step(number: int, image: Path, action_name: str, milestones: Milestones, problems: list[Problem]) -> Step:
    action = parse_action(action_name)
    if action is None:
        problems.append(Problem(image, f"unknown action {action_name}, expected one of {', '.join(ACTIONS)}"))
    path = image.with_suffix(".json")
    raw = _load_json_object(path, problems)
    texts = ["", ""]
    if raw is not None:
        texts = [_description(raw.get(key)) for key in ("landmark_description", "spatial_description")]
        problems += _description_problems(path, texts)
        if find_control_text(*texts):
            texts = ["", ""]
    return Step(
        number=number,
        image=image,
        action=action,
        description_2d=texts[0],
        description_3d=texts[1],
        subinstruction=milestones.subinstruction_at(number),
    )


def _description(value: object) -> str:
    """The text, or the first text of a list, without blanks around it; empty where there is none."""
    if isinstance(value, list) and value:
        value = value[0]
    return value.strip() if isinstance(value, str) else ""


def _description_problems(path: Path, texts: Sequence[str]) -> list[Problem]:
    keys = ("landmark_description", "spatial_description")
    found = [Problem(path, f"{key} is missing or empty") for key, text in zip(keys, texts, strict=True) if not text]
    if control := find_control_text(*texts):
        found.append(Problem(path, f"holds the control token {control}"))
    return found
