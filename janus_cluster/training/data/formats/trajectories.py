"""Upstream's trajectories: records that are episodes, with the frames in a folder of their own.

R2R, RxR   {"episodes": [{"episode_id": 1, "instruction": {"instruction_text": "..."}}]}  in train.json.gz
           <images>/<episode_id>/*.png     step_0006_TURN_LEFT.png: the action taken there is in the name
ScaleVLN,  [{"id", "video": "images/NAME", "instructions": ["..."], "actions": [-1, 1, 2]}]  in annotations.json
DAgger     <images>/NAME/rgb/000.jpg       the action of frame i is actions[i + 1], or STOP behind their end

An annotation lists what was recorded, which is often more than was rendered: a trajectory without any folder is absent,
which is no fault. There are no descriptions: the target is the plain action, asked for as upstream asks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath

from janus_cluster.training.data.formats.source import (
    AbsentError,
    BadUnitError,
    Record,
    Source,
    first_text,
    parse_name,
)
from janus_cluster.training.data.samples import ACTIONS, judge_text, parse_action
from janus_cluster.training.data.store import Collector

# "step_0006_TURN_LEFT.png", "6_TURN_LEFT.png": a number and then the action
NAMED_FRAME = re.compile(r"^(?:[A-Za-z]+_)?(\d+)_([A-Za-z_]+)\.(?:png|jpg|jpeg)$", re.ASCII)
PLAIN_FRAME = re.compile(r"^\D*(\d+)\.(?:png|jpg|jpeg)$", re.ASCII)
FIRST_STEP = -1  # what stands before the first action of "actions"


def claims(record: Record) -> bool:
    """Has it a video and actions, or an episode_id and an instruction, and no frames of its own?"""
    if "images" in record or "image" in record or "current_image" in record:
        return False
    return ("video" in record and "actions" in record) or ("episode_id" in record and "instruction" in record)


def read_record(source: Source, record: Record, label: str, collector: Collector) -> None:
    """Every frame of the episode with a known action is a sample. Raises: BadUnitError, AbsentError."""
    if "video" in record:
        _read_video(source, record, label, collector)
    else:
        _read_named_frames(source, record, collector)


def _read_video(source: Source, record: Record, label: str, collector: Collector) -> None:
    folder = _video_folder(source, record, collector)
    instruction = first_text(record, "instructions", "instruction")
    actions = record["actions"]
    if not isinstance(actions, list) or not all(isinstance(a, int) and not isinstance(a, bool) for a in actions):
        raise BadUnitError("actions must be a list of whole numbers")
    frames = _list_frames(folder, PLAIN_FRAME)
    if len(actions) < len(frames):
        raise BadUnitError(f"{len(actions)} actions but {len(frames)} frames in {folder}")
    if len(actions) > len(frames) and (gap := _first_gap(frames)) is not None:
        raise BadUnitError(f"frame {gap} is missing in {folder}: the actions after it are of other frames")
    name = parse_name(record.get("id")) or label
    taken: list[object] = [*actions[1:], ACTIONS.index("STOP")][: len(frames)]
    # One video may have several annotations with ids of their own; for the split they are one episode.
    _add_frames(
        collector, name=name, episode=str(record["video"]), instruction=instruction, frames=frames, actions=taken
    )


def _read_named_frames(source: Source, record: Record, collector: Collector) -> None:
    name, folder = _episode_folder(source, record)
    collector.watch(folder)
    if not _is_there(folder):
        raise AbsentError(folder)
    instruction = record["instruction"]
    if not isinstance(instruction, Mapping):
        raise BadUnitError("instruction holds no instruction_text")
    text = first_text(instruction, "instruction_text")
    frames = _list_frames(folder, NAMED_FRAME)
    actions = [match[2] for match in map(NAMED_FRAME.match, (frame.name for frame in frames)) if match]
    _add_frames(collector, name=name, episode=name, instruction=text, frames=frames, actions=actions)


def _add_frames(
    collector: Collector,
    *,
    name: str,
    episode: str,
    instruction: str,
    frames: Sequence[Path],
    actions: Sequence[object],
) -> None:
    sequence = collector.sequence(frames)
    number = collector.episode(episode)
    for position, (frame, raw) in enumerate(zip(frames, actions, strict=True)):
        action = parse_action(raw)
        if action is None:
            collector.problem(frame, f"unknown action {raw}, expected one of {', '.join(ACTIONS)} or 0..3", lost=1)
            continue
        collector.sample(
            id=f"{name}/{frame.name}",
            episode=number,
            instruction=instruction,
            action=action,
            sequence=sequence,
            position=position,
        )


def _first_gap(frames: Sequence[Path]) -> int | None:
    """The first number that is missing before or between the frames' numbers, which begin at 0 or 1."""
    numbers = [int(match[1]) for match in map(PLAIN_FRAME.match, (frame.name for frame in frames)) if match]
    if numbers[0] > 1:
        return 0
    return next((n + 1 for n, following in pairwise(numbers) if following != n + 1), None)


def _video_folder(source: Source, record: Record, collector: Collector) -> Path:
    """<images>/NAME/rgb, whether `images` is the folder "images" itself or the one around it.

    Raises: BadUnitError, AbsentError if there is neither.
    """
    video = record["video"]
    if not isinstance(video, str) or not PurePosixPath(video).name or "\0" in video or judge_text(video):
        raise BadUnitError("video is no path")
    root = source.images or source.path.parent
    places = (root / video, root / PurePosixPath(video).name)
    for place in places:
        if _is_there(place):
            collector.watch(place / "rgb")
            return place / "rgb"
    for place in places:
        collector.watch(place / "rgb")
    raise AbsentError(places[0])


def _episode_folder(source: Source, record: Record) -> tuple[str, Path]:
    name = parse_name(record.get("episode_id"))
    if name is None or "/" in name or "\0" in name or name in (".", ".."):
        raise BadUnitError("episode_id is no name")
    return name, (source.images or source.path.parent) / name


def _is_there(folder: Path) -> bool:
    """Whether there is anything of that name. Raises: OSError where that cannot be told: it is no sign of absence."""
    try:
        folder.lstat()
    except FileNotFoundError:
        return False
    return True


def _list_frames(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Frames by their numbers. Raises: BadUnitError if there are none, or two have one number."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries)
    except OSError as error:
        raise BadUnitError(f"no folder of frames: {folder} ({error.strerror})") from error
    found: dict[int, str] = {}
    for name in names:
        if match := pattern.match(name):
            number = int(match[1])
            if number in found:
                raise BadUnitError(f"{folder}: {found[number]} and {name} are both frame {number}")
            found[number] = name
    if not found:
        raise BadUnitError(f"{folder} holds no frame")
    return [folder / found[number] for number in sorted(found)]
