"""The index of one data set: columns of numbers and one blob of text, memory-mapped from a folder of raw arrays.

Samples point into sequences of frames, so the index holds no history: how much of it a sample shows is decided when it
is asked for. 600,000 samples are about 300 MB on disk, shared by all processes of a node.

text      text_offsets [T+1], text_blob [bytes]                      -1: no text
images    image_folder, image_name [I] (texts), image_width, image_height, image_fingerprint [I],
          image_reason [I] (text; -1: can be used)
sequences sequence_offsets [Q+1], sequence_images [...]
episodes  episode_name [E] (text), episode_keys [E] (text: what else names its walk, one a line; see walks.py)
watched   [W] (texts): folders, and frames that cannot be used, whose change is a change of the data set
samples   sample_id, sample_instruction, sample_subinstruction, sample_2d, sample_3d, sample_conversation [N] (texts),
          sample_episode, sample_sequence, sample_position, sample_action [N]
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_cluster.janusvln.data.image_check import check_image
from janus_cluster.janusvln.data.samples import ACTIONS, Problem
from janus_cluster.run.files import read_json, write_json_atomically

Array = NDArray[np.int64]
NO_TEXT = -1

# Which table a column's numbers point into: merging shifts them by what that table already holds.
POINTS_TO = {
    "image_folder": "text",
    "image_name": "text",
    "image_width": None,
    "image_height": None,
    "image_fingerprint": None,
    "image_reason": "text",
    "sequence_images": "image",
    "episode_name": "text",
    "episode_keys": "text",
    "sample_id": "text",
    "sample_instruction": "text",
    "sample_subinstruction": "text",
    "sample_2d": "text",
    "sample_3d": "text",
    "sample_conversation": "text",
    "sample_episode": "episode",
    "sample_sequence": "sequence",
    "sample_position": None,
    "sample_action": None,
    "watched": "text",
}
TEXT = "text_blob"
# Where each text and each sequence ends: a row of another column.
OFFSETS = {"text_offsets": TEXT, "sequence_offsets": "sequence_images"}
COLUMNS = (*POINTS_TO, *OFFSETS, TEXT)
# How long a table, or what offsets point into, is.
ROWS_OF = {
    "text": "text_offsets",
    "image": "image_name",
    "sequence": "sequence_offsets",
    "episode": "episode_name",
    TEXT: TEXT,
    "sequence_images": "sequence_images",
}
WIDE = frozenset({"image_fingerprint", *OFFSETS})  # 64 bits; the others are 32
PROBLEMS_NAME = "problems.jsonl"
COMPLETE_NAME = "complete.json"


def _type_of(column: str) -> type[np.int32] | type[np.int64] | type[np.uint8]:
    if column == TEXT:
        return np.uint8
    return np.int64 if column in WIDE else np.int32


@dataclass(frozen=True, slots=True)
class Columns:
    """Arrays by name, and what could not be used."""

    arrays: dict[str, NDArray[np.generic]]
    problems: list[Problem]


@dataclass
class Collector:
    """Takes what a format reads, checks every image once, and gives columns."""

    decode_images: bool = False
    problems: list[Problem] = field(default_factory=list)
    _texts: dict[str, int] = field(default_factory=dict)
    _images: dict[str, int] = field(default_factory=dict)
    _columns: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in POINTS_TO})
    _watched: set[int] = field(default_factory=set)
    _sequence_ends: list[int] = field(default_factory=lambda: [0])
    # (folder, remark) -> the first frame it is true of, and how many there are
    _remarks: dict[tuple[Path, str], tuple[Path, int]] = field(default_factory=dict)

    def problem(self, path: Path, reason: str, *, lost: int = 0) -> None:
        """Something that cannot be used, and the number of samples that are lost by it, is listed."""
        self.problems.append(Problem(path, reason, lost))

    def unknown_action(self, path: Path, spelling: object, where: str = "") -> None:
        """List a sample of an unknown action."""
        shown = str(spelling).strip()[:60]
        reason = f"{where}unknown action {shown}, expected one of {', '.join(ACTIONS)} or 0..3"
        self.problems.append(Problem(path, reason, lost=1, kind="action", detail=shown))

    def absent(self, folder: Path, reason: str, *, language: str = "") -> None:
        """A trajectory that has no folder is listed; no sample is lost by it."""
        self.problems.append(Problem(folder, reason, kind="absent", detail=language))

    def watch(self, path: Path) -> None:
        """A change of this folder or file is a change of the data set, whether it is there now or not."""
        number = self._text(str(path))
        if number not in self._watched:
            self._watched.add(number)
            self._columns["watched"].append(number)

    def sequence(self, paths: Sequence[Path]) -> int:
        """Number of a new sequence of frames."""
        self._columns["sequence_images"] += [self._image(path) for path in paths]
        self._sequence_ends.append(len(self._columns["sequence_images"]))
        return len(self._sequence_ends) - 2

    def episode(self, name: str, keys: Sequence[str] = ()) -> int:
        """Number of a new episode. Episodes that share a key are of one walk, under any names (walks.py)."""
        self._columns["episode_keys"].append(self._text("\n".join(keys)))
        return self._append("episode_name", self._text(name))

    def sample(
        self,
        *,
        id: str,
        episode: int,
        instruction: str,
        action: int,
        sequence: int,
        position: int,
        texts: Sequence[str] = ("", "", ""),
        conversation: str = "",
    ) -> None:
        """One sample is kept. `texts`: sub-instruction, 2D and 3D description; empty ones are no part of the target."""
        row = {"sample_episode": episode, "sample_action": action, "sample_sequence": sequence}
        row |= {"sample_position": position, "sample_id": self._text(id), "sample_instruction": self._text(instruction)}
        row["sample_conversation"] = self._text(conversation)
        names = ("sample_subinstruction", "sample_2d", "sample_3d")
        row |= {name: self._text(text) for name, text in zip(names, texts, strict=True)}
        for name, value in row.items():
            self._columns[name].append(value)

    def columns(self) -> Columns:
        """Everything that was collected."""
        blobs = [text.encode("utf-8", "surrogateescape") for text in self._texts]
        arrays: dict[str, NDArray[np.generic]] = {
            name: np.array(values, dtype=_type_of(name)) for name, values in self._columns.items()
        }
        arrays["text_offsets"] = np.cumsum([0, *map(len, blobs)], dtype=np.int64)
        arrays["text_blob"] = np.frombuffer(b"".join(blobs), dtype=np.uint8)
        arrays["sequence_offsets"] = np.array(self._sequence_ends, dtype=np.int64)
        remarks = [
            Problem(first, remark + (f" (so are {count - 1} more frames of this folder)" if count > 1 else ""))
            for (_, remark), (first, count) in self._remarks.items()
        ]
        return Columns(arrays, [*self.problems, *remarks])

    def _append(self, column: str, value: int) -> int:
        self._columns[column].append(value)
        return len(self._columns[column]) - 1

    def _text(self, text: str) -> int:
        return self._texts.setdefault(text, len(self._texts)) if text else NO_TEXT

    def _image(self, path: Path) -> int:
        name = str(path)
        known = self._images.get(name)
        if known is not None:
            return known
        facts = check_image(path, decode=self.decode_images)
        if facts.reason:
            self.problems.append(Problem(path, facts.reason, kind="missing" if facts.is_missing else ""))
            self.watch(path)  # repaired in place or made readable, it leaves its folder's time unchanged
        elif facts.remark:
            first, count = self._remarks.get((path.parent, facts.remark), (path, 0))
            self._remarks[path.parent, facts.remark] = (first, count + 1)
        self.watch(path.parent)
        self._append("image_folder", self._text(str(path.parent)))
        self._append("image_name", self._text(path.name))
        self._append("image_width", min(facts.width, 2**31 - 1))
        self._append("image_height", min(facts.height, 2**31 - 1))
        self._append("image_fingerprint", facts.fingerprint)
        self._images[name] = self._append("image_reason", self._text(facts.reason))
        return self._images[name]


class StoreWriter:
    """Appends columns to the files of a new index, so that no more than one part is held in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._files = {name: self._stack.enter_context(_column_file(folder, name).open("wb")) for name in COLUMNS}
        self._problems = self._stack.enter_context((folder / PROBLEMS_NAME).open("w", encoding="utf-8"))
        self._rows = dict.fromkeys(COLUMNS, 0)

    def append(self, part: Columns) -> None:
        """Append the part's rows; they point to each other as before."""
        bases = {table: self._rows[column] for table, column in ROWS_OF.items()}
        for name, table in POINTS_TO.items():
            values: NDArray[Any] = part.arrays[name]
            self._write(name, np.where(values >= 0, values + bases[table], values) if table else values)
        for name, column in OFFSETS.items():
            self._write(name, part.arrays[name][:-1] + bases[column])
        self._write(TEXT, part.arrays[TEXT])
        self._problems.writelines(
            json.dumps([str(p.path), p.reason, p.lost, p.kind, p.detail]) + "\n" for p in part.problems
        )

    def close(self) -> None:
        """Complete the index. All who share data.index_dir may read it, under any umask of the writing process."""
        for name, column in OFFSETS.items():
            self._write(name, np.array([self._rows[column]]))
        self._stack.close()
        write_json_atomically(self._folder / COMPLETE_NAME, {"rows": self._rows})
        for path in self._folder.iterdir():
            path.chmod(0o644)
        self._folder.chmod(0o755)

    def abandon(self) -> None:
        """The files are closed; what is in them is of no use."""
        self._stack.close()

    def _write(self, name: str, values: NDArray[np.generic]) -> None:
        values.astype(_type_of(name), copy=False).tofile(self._files[name])
        self._rows[name] += len(values)


class Store:
    """The columns of one data set. Pickled by its folder where it has one, so that loader processes map it again."""

    def __init__(self, columns: Columns, *, folder: Path | None = None) -> None:
        self.folder = folder
        self.problems = columns.problems
        self._arrays = columns.arrays
        self._blob: NDArray[np.generic] = columns.arrays["text_blob"]
        self._text_offsets = columns.arrays["text_offsets"]

    def __len__(self) -> int:
        return len(self._arrays["sample_id"])

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        if self.folder is not None:
            return load_store, (self.folder,)
        return Store, (Columns(self._arrays, self.problems),)

    def column(self, name: str) -> NDArray[np.generic]:
        """One column as it is in the index."""
        return self._arrays[name]

    def value(self, name: str, row: int) -> int:
        """One number of a column."""
        return int(self._arrays[name][row])

    def text(self, number: int) -> str:
        """A text by its number; empty for NO_TEXT."""
        if number == NO_TEXT:
            return ""
        first, last = int(self._text_offsets[number]), int(self._text_offsets[number + 1])
        return self._blob[first:last].tobytes().decode("utf-8", "surrogateescape")

    def image_path(self, image: int) -> Path:
        """The path of a frame."""
        return Path(self.text(self.value("image_folder", image)), self.text(self.value("image_name", image)))

    def in_memory(self) -> Store:
        """The same, of arrays without files."""
        return Store(Columns({name: np.array(values) for name, values in self._arrays.items()}, self.problems))

    def watched(self) -> list[str]:
        """The folders and broken frames whose change is a change of the data set, each once."""
        return sorted({self.text(int(number)) for number in self._arrays["watched"]})

    def episode_names(self) -> list[str]:
        """The name of every episode, by number."""
        return [self.text(int(number)) for number in self._arrays["episode_name"]]

    def episode_keys(self) -> list[list[str]]:
        """The keys of every episode, by number."""
        texts = [self.text(int(number)) for number in self._arrays["episode_keys"]]
        return [text.split("\n") if text else [] for text in texts]


def write_store(parts: Iterable[Columns], folder: Path) -> Store:
    """An index of the parts, one behind the other, in a folder that is there and empty."""
    writer = StoreWriter(folder)
    try:
        for part in parts:
            writer.append(part)
    except BaseException:
        writer.abandon()
        raise
    writer.close()
    return load_store(folder)


def load_store(folder: Path) -> Store:
    """The columns of a folder, memory-mapped. Raises: OSError, ValueError if it holds no whole index."""
    facts = read_json(folder / COMPLETE_NAME)
    rows = facts.get("rows") if isinstance(facts, dict) else None
    if not isinstance(rows, dict) or not all(isinstance(rows.get(name), int) for name in COLUMNS):
        raise ValueError(f"{folder / COMPLETE_NAME} lacks the lengths of the columns")
    arrays = {name: _map_column(_column_file(folder, name), _type_of(name), rows[name]) for name in COLUMNS}
    with (folder / PROBLEMS_NAME).open(encoding="utf-8") as lines:
        problems = [Problem(Path(path), *facts) for path, *facts in map(json.loads, lines)]
    return Store(Columns(arrays, problems), folder=folder)


def _map_column(path: Path, kind: type[np.generic], rows: int) -> NDArray[np.generic]:
    wanted = rows * np.dtype(kind).itemsize
    if (found := path.stat().st_size) != wanted:
        raise ValueError(f"{path} holds {found} bytes, not {wanted}")
    if not rows:
        return np.zeros(0, dtype=kind)
    # A plain view: indexing a np.memmap costs three times as much, and pickling one copies it.
    return np.memmap(path, dtype=kind, mode="r").view(np.ndarray)


def _column_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.bin"
