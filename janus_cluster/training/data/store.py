"""The index of one data set: columns of numbers and one blob of text, memory-mapped from a folder of .npy files.

Samples point into sequences of frames, so the index holds no history: how much of it a sample shows is decided when it
is asked for. 600,000 samples are about 300 MB on disk, shared by all processes of a node.

text      text_offsets [T+1], text_blob [bytes]                      -1 stands for no text
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
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_cluster.rundir import write_json_atomically
from janus_cluster.training.data.image_check import check_image
from janus_cluster.training.data.samples import Problem

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
OFFSETS = ("text_offsets", "sequence_offsets")
WIDE = frozenset({"image_fingerprint"})  # 64 bits; the others are 32


def _number_type(column: str) -> type[np.int32] | type[np.int64]:
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

    def absent(self, folder: Path, reason: str, *, language: str = "") -> None:
        """A trajectory that has no folder is listed; no sample is lost by it."""
        self.problems.append(Problem(folder, reason, absent=True, language=language))

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
        """Number of a new episode. Episodes that share a key are of one walk, whatever their names (walks.py)."""
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
            name: np.array(values, dtype=_number_type(name)) for name, values in self._columns.items()
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
            self.problem(path, facts.reason)
            self.watch(path)  # mended in place or made readable, it leaves its folder's time as it was
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


def merge_columns(parts: Sequence[Columns]) -> Columns:
    """One set of columns that holds the parts one after the other."""
    merged: dict[str, list[NDArray[np.generic]]] = {name: [] for name in (*POINTS_TO, *OFFSETS, "text_blob")}
    bases = dict.fromkeys(("text", "image", "sequence", "episode", "sequence_images", "text_blob"), 0)
    for part in parts:
        arrays = part.arrays
        for name, table in POINTS_TO.items():
            values: NDArray[np.integer[Any]] = arrays[name].astype(_number_type(name), copy=False)
            shift = bases[table] if table else 0
            merged[name].append(np.where(values >= 0, values + shift, values).astype(values.dtype) if shift else values)
        merged["text_blob"].append(arrays["text_blob"])
        for name, table in (("text_offsets", "text_blob"), ("sequence_offsets", "sequence_images")):
            merged[name].append(arrays[name][:-1].astype(np.int64) + bases[table])
        bases["text"] += len(arrays["text_offsets"]) - 1
        bases["sequence"] += len(arrays["sequence_offsets"]) - 1
        bases["image"] += len(arrays["image_name"])
        bases["episode"] += len(arrays["episode_name"])
        bases["sequence_images"] += len(arrays["sequence_images"])
        bases["text_blob"] += len(arrays["text_blob"])
    merged["text_offsets"].append(np.array([bases["text_blob"]], dtype=np.int64))
    merged["sequence_offsets"].append(np.array([bases["sequence_images"]], dtype=np.int64))
    arrays = {name: np.concatenate(values) if values else np.zeros(0, np.int32) for name, values in merged.items()}
    return Columns(arrays, [problem for part in parts for problem in part.problems])


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
        """One column as it lies in the index."""
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
        """Where a frame lies."""
        return Path(self.text(self.value("image_folder", image)), self.text(self.value("image_name", image)))

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


def write_store(columns: Columns, folder: Path) -> None:
    """`folder` holds the columns, whole or not at all; one that another process wrote meanwhile is as good."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".building-"))
    try:
        for name, values in columns.arrays.items():
            np.save(building / f"{name}.npy", values, allow_pickle=False)
        lines = (json.dumps([str(p.path), p.reason, p.lost, p.absent, p.language]) for p in columns.problems)
        (building / "problems.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        write_json_atomically(building / "complete.json", {"samples": len(columns.arrays["sample_id"])})
        # Whoever shares data.index_dir may read it, whatever the umask of the one who came first.
        for path in building.iterdir():
            path.chmod(0o644)
        building.chmod(0o755)
        try:
            building.rename(folder)
        except OSError:
            if not (folder / "complete.json").is_file():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def load_store(folder: Path) -> Store:
    """The columns of a folder, memory-mapped. Raises: OSError, ValueError if it holds no whole index."""
    arrays: dict[str, NDArray[np.generic]] = {}
    for name in (*POINTS_TO, *OFFSETS, "text_blob"):
        arrays[name] = _map_array(folder / f"{name}.npy")
    with (folder / "problems.jsonl").open(encoding="utf-8") as lines:
        problems = [Problem(Path(path), *facts) for path, *facts in map(json.loads, lines)]
    return Store(Columns(arrays, problems), folder=folder)


def _map_array(path: Path) -> NDArray[np.generic]:
    try:
        mapped: NDArray[np.generic] = np.load(path, mmap_mode="r", allow_pickle=False)
    except EOFError as error:
        raise ValueError(f"{path} is empty") from error
    # A plain view: indexing a np.memmap costs three times as much, and pickling one copies it.
    return mapped.view(np.ndarray)
