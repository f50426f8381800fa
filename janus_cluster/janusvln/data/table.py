"""Samples of one or several indexes as a sequence that makes each sample when it is asked for.

Legend: N samples, F = history + 1 frames at most.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from janus_cluster.janusvln.data.formats.annotation import IMAGE_TAG
from janus_cluster.janusvln.data.history import history_positions
from janus_cluster.janusvln.data.samples import Sample
from janus_cluster.janusvln.data.store import Store

Indices = NDArray[np.int64]
ROWS_AT_ONCE = 65_536


@dataclass(frozen=True, eq=False)
class SampleTable(Sequence[Sample]):
    """N samples: `root_index` [N] into data.roots (and `stores`), `rows` [N] into that root's index."""

    stores: tuple[Store, ...]
    root_index: Indices
    rows: Indices
    max_history: int
    pad_history: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> SampleTable: ...

    def __getitem__(self, index: int | slice) -> Sample | SampleTable:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        return self._make(index, paths=True)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def outlines(self) -> Iterator[Sample]:
        """The samples with nameless frames: their texts and numbers of frames, in half the time."""
        return (self._make(i, paths=False) for i in range(len(self)))

    def select(self, indices: NDArray[np.generic]) -> SampleTable:
        """The samples at these indices, or where a mask is true, in that order."""
        return replace(self, root_index=self.root_index[indices], rows=self.rows[indices])

    def _make(self, index: int, *, paths: bool) -> Sample:
        store = self.stores[self.root_index[index]]
        shown, images = _shown(store, int(self.rows[index]), self.max_history, self.pad_history)
        if not paths:
            return _make_sample(store, int(self.rows[index]), shown, (Path(),) * len(images))
        frames = tuple(store.image_path(image) for image in images)
        sizes = tuple((store.value("image_width", image), store.value("image_height", image)) for image in images)
        return _make_sample(store, int(self.rows[index]), shown, frames, sizes)

    def fingerprint(self) -> str:
        """Changes where samples were added, removed or put in another order; not where a text was corrected."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.root_index, self.rows):
            digest.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
        for root, store in enumerate(self.stores):
            own = self.rows[self.root_index == root]
            for name in ("sample_episode", "sample_sequence", "sample_position", "sample_action"):
                digest.update(store.column(name)[own].astype(np.int64).tobytes())
        return digest.hexdigest()

    def episode_numbers(self) -> Indices:
        """A number for each sample that is the same for samples of one episode of one root. Shapes: [N]."""
        numbers = np.zeros(len(self), dtype=np.int64)
        for root, store in enumerate(self.stores):
            own = self.root_index == root
            numbers[own] = store.column("sample_episode")[self.rows[own]].astype(np.int64) + (root << 32)
        return numbers


def shown_images(store: Store, rows: Indices, *, max_history: int, pad: bool) -> NDArray[np.int64]:
    """Numbers of the images that each sample shows, oldest first; -1 behind the last one. Shapes: [rows, F]."""
    positions, kind = np.unique(store.column("sample_position")[rows], return_inverse=True)
    steps = np.full((len(positions), max_history + 1), -1, dtype=np.int64)
    for i, position in enumerate(positions):
        shown = history_positions(int(position), max_history, pad=pad)
        steps[i, : len(shown)] = shown
    steps = steps[kind]
    starts = store.column("sequence_offsets")[store.column("sample_sequence")[rows]].astype(np.int64)
    images = store.column("sequence_images")[np.where(steps < 0, 0, starts[:, None] + steps)].astype(np.int64)
    return np.where(steps < 0, -1, images)


class GroupFrames(NamedTuple):
    """Frames of groups of samples, each frame of a group once: its group and its fingerprint. Shapes: [P].

    `repeated`: fingerprints that different files of one sequence have.
    """

    group: Indices
    fingerprint: Indices
    repeated: Indices


def group_frames(store: Store, rows: Indices, group: Indices) -> GroupFrames:
    """The frames in the sequences of these samples of one index; `group` [rows] numbers each sample's group."""
    sequence, group = unique_pairs(store.column("sample_sequence")[rows].astype(np.int64), group)
    offsets = store.column("sequence_offsets").astype(np.int64)
    lengths = offsets[sequence + 1] - offsets[sequence]
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    images = store.column("sequence_images")[np.repeat(offsets[sequence], lengths) + within].astype(np.int64)
    fingerprints = store.column("image_fingerprint").astype(np.int64)
    of_sequence, shown = unique_pairs(np.repeat(sequence, lengths), images)
    order = np.lexsort((fingerprints[shown], of_sequence))
    content, of_sequence = fingerprints[shown][order], of_sequence[order]
    is_twice = (content[1:] == content[:-1]) & (of_sequence[1:] == of_sequence[:-1])
    of_group, images = unique_pairs(np.repeat(group, lengths), images)
    return GroupFrames(of_group, fingerprints[images], np.unique(content[1:][is_twice]))


def unique_pairs(first: Indices, second: Indices) -> tuple[Indices, Indices]:
    """The distinct pairs, ordered by `first` and then by `second`. Shapes: [N], [N]."""
    order = np.lexsort((second, first))
    first, second = first[order], second[order]
    is_new = np.ones(len(first), dtype=np.bool_)
    is_new[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    return first[is_new], second[is_new]


def blocks(rows: Indices) -> Iterator[slice]:
    """Slices of about equal memory: F numbers a sample would be 1 GB for millions of them."""
    return (slice(start, start + ROWS_AT_ONCE) for start in range(0, len(rows), ROWS_AT_ONCE))


def _shown(store: Store, row: int, max_history: int, pad: bool) -> tuple[tuple[int, ...], list[int]]:
    """Positions in the sample's sequence that it shows, and the images there."""
    shown = history_positions(store.value("sample_position", row), max_history, pad=pad)
    start = store.value("sequence_offsets", store.value("sample_sequence", row))
    return shown, [store.value("sequence_images", start + position) for position in shown]


def _make_sample(
    store: Store,
    row: int,
    shown: Sequence[int],
    frames: tuple[Path, ...],
    sizes: tuple[tuple[int, int], ...] = (),
) -> Sample:
    def text(column: str) -> str:
        return store.text(store.value(column, row))

    conversation = text("sample_conversation")
    return Sample(
        id=text("sample_id"),
        episode=store.text(store.value("episode_name", store.value("sample_episode", row))),
        instruction=text("sample_instruction"),
        subinstruction=text("sample_subinstruction"),
        description_2d=text("sample_2d"),
        description_3d=text("sample_3d"),
        action=store.value("sample_action", row),
        frames=frames,
        frame_sizes=sizes,
        user_parts=_cut_conversation(conversation, shown) if conversation else None,
    )


def _cut_conversation(conversation: str, shown: Sequence[int]) -> tuple[str, ...]:
    """The conversation cut at the images that are shown; the tag of one that is not shown leaves nothing behind."""
    parts = conversation.split(IMAGE_TAG)
    cut = [parts[0] + "".join(parts[1 : shown[0] + 1])]
    for before, after in pairwise(shown):
        cut.append("".join(parts[before + 1 : after + 1]))
    cut.append("".join(parts[shown[-1] + 1 :]))
    return tuple(cut)
