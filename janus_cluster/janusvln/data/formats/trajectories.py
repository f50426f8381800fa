"""Upstream's trajectories: records that are episodes, with the frames in a folder of their own.

R2R, RxR   {"episodes": [{"episode_id": 1, "instruction": {"instruction_text": "..."}}]}  in train.json.gz
           <images>/<episode_id>/*.png     step_0006_TURN_LEFT.png: the action taken there is in the name
ScaleVLN,  [{"id", "video": "images/NAME", "instructions": ["..."], "actions": [-1, 1, 2]}]  in annotations.json
DAgger     <images>/NAME/rgb/000.jpg       the action of frame i is actions[i + 1], or STOP behind their end

"actions" must leave no doubt which frame each belongs to: they begin with -1, no frame is missing, STOP is the last.
An annotation lists what was recorded, which is often more than was rendered: a trajectory without any folder is absent,
which is no fault. There are no descriptions: the target is the plain action, asked for as upstream asks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from janus_cluster.janusvln.data.formats.source import (
    ODD_SUFFIX,
    AbsentError,
    BadUnitError,
    Record,
    Source,
    UnknownActionError,
    first_text,
    has_odd_suffix,
    parse_name,
)
from janus_cluster.janusvln.data.formats.walks import dataset_of, walk_keys
from janus_cluster.janusvln.data.samples import ACTIONS, judge_text
from janus_cluster.janusvln.data.store import Collector

# "step_0006_TURN_LEFT.png", "6_TURN_LEFT.png": a number and then the action
NAMED_FRAME = re.compile(r"^(?:[A-Za-z]+_)?(\d+)_([A-Za-z_]+)\.(?:png|jpg|jpeg)$", re.ASCII)
PLAIN_FRAME = re.compile(r"^\D*(\d+)\.(?:png|jpg|jpeg)$", re.ASCII)
FIRST_STEP = -1  # the entry before the first action of "actions"
STOP = ACTIONS.index("STOP")


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
    frames = _list_frames(folder, PLAIN_FRAME, collector)
    taken = _actions_of_frames(record["actions"], frames)
    name = parse_name(record.get("id")) or label
    video = str(record["video"])
    # One video may have several annotations with ids of their own; for the split they are one episode.
    number = collector.episode(video, walk_keys(record, names=(PurePosixPath(video).name,)))
    _add_frames(source, collector, name=name, episode=number, instruction=instruction, frames=frames, actions=taken)


def _actions_of_frames(actions: object, frames: Sequence[Path]) -> list[object]:
    """The action of each frame. Raises: BadUnitError where it could be another frame's."""
    if not isinstance(actions, list) or not all(isinstance(a, int) and not isinstance(a, bool) for a in actions):
        raise BadUnitError("actions must be a list of whole numbers")
    counts = f"{len(actions)} actions, {len(frames)} frames in {frames[0].parent}"
    if not actions or actions[0] != FIRST_STEP:
        shown = f"actions[0] = {actions[0]}" if actions else "none"
        raise BadUnitError(
            f"actions do not begin with {FIRST_STEP} ({counts}, {shown}): actions[i + 1] belongs to frame i, so put "
            f"{FIRST_STEP} before the first"
        )
    if FIRST_STEP in actions[1:]:
        raise BadUnitError(
            f"actions[{actions.index(FIRST_STEP, 1)}] is {FIRST_STEP}, which is valid only as the first ({counts})"
        )
    if len(actions) < len(frames):
        raise BadUnitError(f"{len(actions)} actions but {len(frames)} frames in {frames[0].parent}")
    # Frames that are numbered from 1 may have lost frame 0; the number of actions shows whether.
    num_actions = len(actions) - (actions[-1] == STOP)
    first = 1 if _number(frames[0]) == 1 and num_actions == len(frames) else 0
    if (gap := _first_gap(frames, first)) is not None:
        raise BadUnitError(f"frame {gap} is missing in {frames[0].parent}: the actions after it are of other frames")
    taken = [*actions[1:], STOP][: len(frames)]
    if STOP in taken[:-1]:
        at = taken.index(STOP)
        raise BadUnitError(f"actions[{at + 1}] is STOP, but {len(frames) - 1 - at} frames follow ({counts})")
    return taken


def _read_named_frames(source: Source, record: Record, collector: Collector) -> None:
    name, folder = episode_folder(source, record)
    collector.watch(folder)
    if not _is_there(folder):
        raise AbsentError(folder)
    instruction = record["instruction"]
    if not isinstance(instruction, Mapping):
        raise BadUnitError("instruction holds no instruction_text")
    text = first_text(instruction, "instruction_text")
    frames = _list_frames(folder, NAMED_FRAME, collector)
    if (gap := _first_gap(frames, _number(frames[0]))) is not None:
        # Each action is in its frame's name, so none moves; but the history jumps there.
        collector.problem(folder, f"frame {gap} is missing between {frames[0].name} and {frames[-1].name}")
    actions = [match[2] for match in map(NAMED_FRAME.match, (frame.name for frame in frames)) if match]
    keys = walk_keys(record, names=(name,), dataset=dataset_of(source.path, record))
    episode = collector.episode(name, keys)
    _add_frames(source, collector, name=name, episode=episode, instruction=text, frames=frames, actions=actions)


def _add_frames(
    source: Source,
    collector: Collector,
    *,
    name: str,
    episode: int,
    instruction: str,
    frames: Sequence[Path],
    actions: Sequence[object],
) -> None:
    sequence = collector.sequence(frames)
    for position, (frame, raw) in enumerate(zip(frames, actions, strict=True)):
        try:
            action = source.parse_action(raw)
        except UnknownActionError as error:
            collector.unknown_action(frame, error.spelling)
            continue
        collector.sample(
            id=f"{name}/{frame.name}",
            episode=episode,
            instruction=instruction,
            action=action,
            sequence=sequence,
            position=position,
        )


def _number(frame: Path) -> int:
    match = NAMED_FRAME.match(frame.name) or PLAIN_FRAME.match(frame.name)
    return int(match[1]) if match else 0


def _first_gap(frames: Sequence[Path], first: int) -> int | None:
    """The first number that is missing among the frames' numbers, which should run from `first` on."""
    return next((wanted for wanted, frame in enumerate(frames, first) if _number(frame) != wanted), None)


def _video_folder(source: Source, record: Record, collector: Collector) -> Path:
    """<images>/NAME/rgb, whether `images` is the folder "images" itself or the one around it.

    Raises: BadUnitError, AbsentError if there is neither.
    """
    places = video_places(source, record)
    for place in places:
        if _is_there(place):
            collector.watch(place / "rgb")
            return place / "rgb"
    for place in places:
        collector.watch(place / "rgb")
    raise AbsentError(places[0])


def video_places(source: Source, record: Record) -> tuple[Path, ...]:
    """Possible folders of a record's video. Raises: BadUnitError."""
    video = record["video"]
    if not isinstance(video, str) or not PurePosixPath(video).name or "\0" in video or judge_text(video):
        raise BadUnitError("video is no path")
    return source.frames / source.moved(video), source.frames / PurePosixPath(video).name


def language_of(record: Record) -> str:
    """The language of an instruction, as RxR names it; empty where nothing does."""
    instruction = record.get("instruction")
    language = instruction.get("language") if isinstance(instruction, Mapping) else None
    return language if isinstance(language, str) and judge_text(language) is None else ""


def folders_of(source: Source, record: Record) -> tuple[Path, ...]:
    """Possible folders of a record's frames; the first that exists holds them. Raises: BadUnitError."""
    return video_places(source, record) if "video" in record else (episode_folder(source, record)[1],)


def episode_folder(source: Source, record: Record) -> tuple[str, Path]:
    """The name of a record's episode, and its folder of frames. Raises: BadUnitError."""
    name = parse_name(record.get("episode_id"))
    if name is None or "/" in name or "\0" in name or name in (".", ".."):
        raise BadUnitError("episode_id is no name")
    return name, source.frames / name


def _is_there(folder: Path) -> bool:
    """Whether there is anything of that name. Raises: OSError where that cannot be checked: no sign of absence."""
    try:
        folder.lstat()
    except FileNotFoundError:
        return False
    return True


def _list_frames(folder: Path, pattern: re.Pattern[str], collector: Collector) -> list[Path]:
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
        elif has_odd_suffix(name, pattern):
            collector.problem(folder / name, ODD_SUFFIX, lost=1)
    if not found:
        raise BadUnitError(f"{folder} holds no frame")
    return [folder / found[number] for number in sorted(found)]
