"""Records that are samples with all four texts.

    {"id", "instruction", "subinstruction", "2D_description", "3D_description", "action", "images": [..., current]}

The other names of each field are in the tables below. `images` are oldest first, the current frame last.
"""

from __future__ import annotations

from pathlib import Path

from janus_cluster.janusvln.data.formats.source import (
    BadUnitError,
    Record,
    Source,
    find_text,
    first_text,
    parse_image_paths,
    parse_name,
)
from janus_cluster.janusvln.data.formats.walks import folder_names, walk_keys
from janus_cluster.janusvln.data.store import Collector

INSTRUCTION_NAMES = ("instruction", "instruction_text", "full_instruction", "instructions")
SUBINSTRUCTION_NAMES = ("subinstruction", "sub_instruction", "sub_instruction_text")
NAMES_2D = ("2D_description", "2d_description", "description_2d")
NAMES_3D = ("3D_description", "3d_description", "description_3d")
ACTION_NAMES = ("action", "action_label", "actions")
IMAGE_NAMES = ("images", "image", "current_image")
EPISODE_NAMES = ("episode", "episode_id")


def claims(record: Record) -> bool:
    """Has it a frame and an action?"""
    return any(name in record for name in IMAGE_NAMES) and any(name in record for name in ACTION_NAMES)


def read_record(source: Source, record: Record, label: str, collector: Collector) -> None:
    """The record is one sample. Raises: BadUnitError, UnknownActionError."""
    images = record_images(source, record)
    instruction = first_text(record, *INSTRUCTION_NAMES)
    texts = [_subinstruction(record), first_text(record, *NAMES_2D), first_text(record, *NAMES_3D)]
    action = _parse_record_action(source, record)
    name = record_name(record, label)
    collector.sample(
        id=name,
        episode=record_episode(record, name, images[-1], collector),
        instruction=instruction,
        action=action,
        sequence=collector.sequence(images),
        position=len(images) - 1,
        texts=texts,
    )


def record_images(source: Source, record: Record) -> list[Path]:
    """The frames of a record. Relative paths are under the root's `images`, the record's data_path, or the file."""
    root = source.frames
    own = record.get("data_path")
    if source.images is None and own is not None:
        root = parse_image_paths(own, root, source)[0]
    for name in ("images", "image"):
        if record.get(name) is not None:
            return parse_image_paths(record[name], root, source)
    if record.get("current_image") is None:
        raise BadUnitError("images is missing")
    history = record.get("history_images") or []
    earlier = parse_image_paths(history, root, source) if history else []
    return [*earlier, *parse_image_paths(record["current_image"], root, source)]


def record_name(record: Record, label: str) -> str:
    """The record's own id, or file and number."""
    if record.get("id") is None:
        return label
    name = parse_name(record["id"])
    if name is None:
        raise BadUnitError("id is no text and no number")
    return name


def record_episode(record: Record, name: str, current: Path, collector: Collector) -> int:
    """The record's episode: its own field, its id up to the last /, or its folder."""
    own = next((found for field in EPISODE_NAMES if (found := parse_name(record.get(field)))), None)
    episode = own or name.rpartition("/")[0] or str(current.parent)
    return collector.episode(episode, walk_keys(record, names=(episode, *folder_names(current))))


def _subinstruction(record: Record) -> str:
    """The field must be there, but may be an empty text: so are those of episodes without milestones."""
    text = find_text(record, *SUBINSTRUCTION_NAMES)
    return (
        text
        if any(record.get(name) == "" for name in SUBINSTRUCTION_NAMES)
        else first_text(record, *SUBINSTRUCTION_NAMES)
    )


def _parse_record_action(source: Source, record: Record) -> int:
    value = next((record[name] for name in ACTION_NAMES if record.get(name) is not None), None)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return source.parse_action(value)
