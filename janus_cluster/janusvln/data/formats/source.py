"""A root of the job file as the formats see it, and fields of JSON that may be of any type."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from janus_cluster.janusvln.data.samples import judge_text, parse_action
from janus_cluster.janusvln.data.store import Collector

Record = Mapping[str, Any]

PICTURE_SUFFIXES = frozenset({"png", "jpg", "jpeg", "jpe", "jfif", "webp", "bmp", "gif", "tif", "tiff", "ppm", "avif"})
ODD_SUFFIX = "has an odd suffix: frames end in .png, .jpg or .jpeg, in small letters"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One data set: its path, the format's name, the root of relative image paths, how images are checked.

    `image_roots`: another machine's folders of frames → those here. `actions`: other spellings, in capitals.
    """

    path: Path
    format: str
    images: Path | None = None
    decode_images: bool = False
    image_roots: Mapping[str, str] = field(default_factory=dict)
    actions: Mapping[str, str] = field(default_factory=dict)

    @property
    def frames(self) -> Path:
        """The folder of relative paths of frames."""
        return self.images or (self.path if self.format == "episodes" else self.path.parent)

    def parse_action(self, value: object) -> int:
        """The label of an action as this data set spells it. Raises: UnknownActionError."""
        label = parse_action(value, self.actions)
        if label is None:
            raise UnknownActionError(value)
        return label

    def moved(self, path: str) -> str:
        """A path of the machine where the data set was made, as it is here; the longest matching place counts."""
        places = [place for place in self.image_roots if path == place or path.startswith(f"{place.rstrip('/')}/")]
        if not places:
            return path
        place = max(places, key=len)
        return str(Path(self.image_roots[place], path[len(place) :].lstrip("/")))


class Units(Protocol):
    """What a data set holds, in order. Iterating raises UsageError where it cannot be read to its end."""

    def __iter__(self) -> Iterator[Any]:
        """Each unit."""

    def share_read(self) -> float:
        """How much has been iterated over, 0 to 1."""


class Format(Protocol):
    """One kind of data set. A unit is what is read at one go (an episode, a record); units are sent to processes."""

    def list_units(self, source: Source) -> Units:
        """Everything to be read. Raises: UsageError if the data set cannot be read at all."""

    def read_unit(self, source: Source, unit: Any, collector: Collector) -> None:
        """The unit's samples and problems are in the collector."""


class BadUnitError(Exception):
    """A unit of which nothing can be used, and why. It is caught inside the formats and becomes a listed problem."""


class UnknownActionError(Exception):
    """A sample's action is none that is known. It never leaves the formats."""

    def __init__(self, spelling: object) -> None:
        super().__init__(f"unknown action {spelling!r}")
        self.spelling = spelling


class AbsentError(Exception):
    """A trajectory without its folder of frames. Annotations list more than was rendered: it is counted apart."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"no folder of frames: {folder}")
        self.folder = folder


def load_json_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file. Raises: BadUnitError with the reason why there is none."""
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise BadUnitError("is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BadUnitError(f"cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise BadUnitError(f"holds a {type(value).__name__}, expected an object")
    return value


def first_text(record: Record, *names: str) -> str:
    """The first of the fields that is there, as text without blanks around it; of a list its first text.

    Raises: BadUnitError if there is none, it is empty, or it is no text.
    """
    value = find_text(record, *names)
    if not value:
        raise BadUnitError(f"{names[0]} is missing or empty")
    return value


def find_text(record: Record, *names: str) -> str:
    """Like first_text, but empty where there is none. Raises: BadUnitError if it is there and no text."""
    name, value = next(((n, record[n]) for n in names if record.get(n) is not None), (names[0], ""))
    if isinstance(value, list):
        value = value[0] if value else ""
    if not isinstance(value, str):
        raise BadUnitError(f"{name} holds a {type(value).__name__}, expected text")
    text = value.strip()
    if reason := judge_text(text):
        raise BadUnitError(f"{name} {reason}")
    return text


def parse_name(value: object) -> str | None:
    """An identifier as text: a text that is not empty, or a whole number."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip() and judge_text(value) is None:
        return value.strip()
    return None


def parse_image_paths(value: object, root: Path, source: Source) -> list[Path]:
    """Paths of frames as they are here, relative ones under `root`. Raises: BadUnitError if they are none."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names:
        raise BadUnitError("images must be a list of one or more paths")
    for position, name in enumerate(names):
        if not isinstance(name, str) or not name.strip() or "\0" in name or judge_text(name):
            raise BadUnitError(f"images[{position}] is no path")
    return [root / source.moved(name) for name in names]


def has_odd_suffix(name: str, pattern: re.Pattern[str]) -> bool:
    """Whether a file would be a frame of this pattern, were it named .png, .jpg or .jpeg: FRAME.JPG, FRAME.webp."""
    stem, _, suffix = name.rpartition(".")
    return suffix.lower() in PICTURE_SUFFIXES and pattern.match(f"{stem}.png") is not None and not pattern.match(name)


def file_stamp(path: Path) -> str:
    """Size and times of change of one file or folder; empty where there is none.

    The second time changes with the rights too: what could not be read is read again after a chmod.
    """
    try:
        facts = path.stat()
    except OSError:
        return ""
    return f"{facts.st_size}:{facts.st_mtime_ns}:{facts.st_ctime_ns}"


def folder_stamps(folder: Path) -> Iterable[str]:
    """Name, size and time of change of every file in a folder, in the order of the names."""
    try:
        with os.scandir(folder) as entries:
            # Each separately: one broken link must not hide the result of the others.
            found = [f"{entry.name}:{file_stamp(Path(entry.path))}" for entry in entries]
    except OSError:
        return []
    return sorted(found)


def digest(lines: Iterable[str]) -> str:
    """One hash over lines."""
    sha = hashlib.sha256()
    for line in lines:
        sha.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return sha.hexdigest()
