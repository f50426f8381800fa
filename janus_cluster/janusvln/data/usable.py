"""Which samples of an index can be used, for how much history the job shows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from janus_cluster.janusvln.data.samples import Problem
from janus_cluster.janusvln.data.store import Store
from janus_cluster.janusvln.data.table import Indices, SampleTable, blocks, shown_images
from janus_cluster.job.schema import Data
from janus_cluster.modelspec.frames import frame_shape, qwen_grid

MERGE_LENGTH = 4  # Qwen2.5-VL merges 2 × 2 patches into one token
IMAGE_MARKS = 2  # <|vision_start|> and <|vision_end|>


def judge_samples(store: Store, data: Data, *, pad_history: bool) -> tuple[NDArray[np.bool_], list[Problem]]:
    """A mask of the samples whose frames can be decoded together, and a problem for every other one.

    A sample that shows a broken frame is not used: leaving the frame out would make another history of it.
    """
    rows = np.arange(len(store), dtype=np.int64)
    broken = store.column("image_reason").astype(np.int64) >= 0
    shape = _shape_numbers(store, data)
    good = np.ones(len(rows), dtype=np.bool_)
    problems: list[Problem] = []
    for block in blocks(rows):
        images = shown_images(store, rows[block], max_history=data.history, pad=pad_history)
        there = images >= 0
        current = _last(images, there)
        shows_broken = broken[images] & there
        differs = (shape[images] != shape[current][:, None]) & there
        bad = (shows_broken | differs).any(axis=1)
        good[block] = ~bad
        for i in np.flatnonzero(bad):
            row = int(rows[block][i])
            problems.append(_sample_problem(store, row, images[i], shows_broken[i], differs[i]))
    return good, problems


def count_image_tokens(table: SampleTable, data: Data) -> Indices:
    """Tokens of all images of each sample, with the two marks around each. Shapes: [N]."""
    counts = np.zeros(len(table), dtype=np.int64)
    for root, store in enumerate(table.stores):
        own = np.flatnonzero(table.root_index == root)
        tokens = _tokens_of_images(store, data)
        for block in blocks(own):
            rows = table.rows[own[block]]
            images = shown_images(store, rows, max_history=table.max_history, pad=table.pad_history)
            counts[own[block]] = np.where(images < 0, 0, tokens[images]).sum(axis=1)
    return counts


def tokens_of_frame(width: int, height: int, data: Data) -> int:
    """Number of tokens of one frame of a file of that size, with its two marks."""
    _, rows, columns = qwen_grid(*frame_shape(width, height, data))
    return rows * columns // MERGE_LENGTH + IMAGE_MARKS


def _last(images: NDArray[np.int64], there: NDArray[np.bool_]) -> NDArray[np.int64]:
    last = there.sum(axis=1) - 1
    return np.asarray(images[np.arange(len(images)), last])


def _sizes(store: Store) -> tuple[list[tuple[int, int]], NDArray[np.int64]]:
    """The distinct (width, height) and which of them each image has."""
    packed = (store.column("image_width").astype(np.int64) << 32) | store.column("image_height").astype(np.int64)
    distinct, which = np.unique(packed, return_inverse=True)
    return [(int(size) >> 32, int(size) & 0xFFFFFFFF) for size in distinct], which


def _shape_numbers(store: Store, data: Data) -> NDArray[np.int64]:
    """A number for each image that is the same for images of one size after resizing."""
    sizes, which = _sizes(store)
    shapes: dict[tuple[int, int], int] = {}
    numbers = [
        shapes.setdefault(frame_shape(width, height, data) if width and height else (0, 0), len(shapes))
        for width, height in sizes
    ]
    return np.array(numbers, dtype=np.int64)[which]


def _tokens_of_images(store: Store, data: Data) -> NDArray[np.int64]:
    sizes, which = _sizes(store)
    tokens = [tokens_of_frame(width, height, data) if width and height else 0 for width, height in sizes]
    return np.array(tokens, dtype=np.int64)[which]


def _sample_problem(
    store: Store,
    row: int,
    images: NDArray[np.int64],
    shows_broken: NDArray[np.bool_],
    differs: NDArray[np.bool_],
) -> Problem:
    name = store.text(store.value("sample_id", row))
    if shows_broken.any():
        image = int(images[np.flatnonzero(shows_broken)[0]])
        reason = f"sample {name} shows this frame, which {store.text(store.value('image_reason', image))}"
    else:
        image = int(images[np.flatnonzero(differs)[0]])
        size = f"{store.value('image_width', image)}×{store.value('image_height', image)}"
        reason = f"sample {name} shows this frame of {size} pixels with a current one of another shape"
    return Problem(store.image_path(image), reason, lost=1)
