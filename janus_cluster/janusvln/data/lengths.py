"""How many tokens each sample has, counted without decoding an image; samples that have too many."""

from __future__ import annotations

import hashlib
import io
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from janus_cluster.errors import UsageError
from janus_cluster.janusvln.data.indexing import Share, num_processes
from janus_cluster.janusvln.data.pool import run_tasks
from janus_cluster.janusvln.data.prompt import render_prompt_parts
from janus_cluster.janusvln.data.samples import Sample
from janus_cluster.janusvln.data.store import Store
from janus_cluster.janusvln.data.table import Indices, SampleTable
from janus_cluster.janusvln.data.text_counts import count_rows, count_texts, piece_lengths, sample_pieces, whole_table
from janus_cluster.janusvln.data.usable import count_image_tokens
from janus_cluster.job.schema import Data
from janus_cluster.run.files import write_bytes_atomically

SAMPLES_AT_ONCE = 8_192
# A process takes 1.5 s to start with the tokenizer, in which 10,000 samples are counted: one is started for 20,000.
SAMPLES_PER_UNIT = 20
TOO_LONG_SHOWN = 5


def load_token_counts(
    table: SampleTable, *, tokenizer: Any, data: Data, share: Share | None = None, what: str = "samples"
) -> Indices:
    """The number of tokens of each sample as NavigationDataset gives it, history shortened where the policy allows it.

    Text is counted once for each index, tokenizer and history, and kept beside the index. With `share` only one rank
    counts. `what` the samples are called in an error. Shapes: [N].
    Raises: UsageError if samples are too long and may not, or cannot, be shortened.
    """
    outcome: Any = None
    if share is None or share.is_builder:
        try:
            outcome = _count(table, tokenizer, data, what)
        except UsageError as error:
            outcome = error
    if share is not None:
        outcome = share.broadcast(outcome)
    if isinstance(outcome, UsageError):
        raise outcome
    return np.asarray(outcome, dtype=np.int64)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of everything that decides what a text's ids are."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def _count(table: SampleTable, tokenizer: Any, data: Data, what: str) -> Indices:
    counts = count_image_tokens(table, data)
    for root, store in enumerate(table.stores):
        own = table.root_index == root
        counts[own] += _load_text_counts(store, table, tokenizer)[table.rows[own]]
    too_long = np.flatnonzero(counts > data.max_length)
    if len(too_long) and data.on_too_long == "fail":
        raise _too_long_error(table, counts, too_long, data, what)
    for i in too_long:
        counts[i] = _shortened_count(table[int(i)], int(counts[i]), tokenizer, data)
    still = np.flatnonzero(counts > data.max_length)
    if len(still):
        raise _too_long_error(table, counts, still, data, what)
    return counts


def _load_text_counts(store: Store, table: SampleTable, tokenizer: Any) -> Indices:
    """Tokens of text of every sample of the index; from the file beside it where that was counted before."""
    key = [tokenizer_fingerprint(tokenizer), str(table.max_history), str(table.pad_history)]
    key += [repr(render_prompt_parts("?", num_history=n, four_parts=f)) for n in (0, 1) for f in (True, False)]
    name = f"tokens-{hashlib.sha256(''.join(key).encode()).hexdigest()[:16]}.npy"
    if store.folder is not None:
        try:
            kept = np.load(store.folder / name, allow_pickle=False)
            if kept.shape == (len(store),):
                return np.asarray(kept, dtype=np.int64)
        except (OSError, ValueError):
            pass  # not counted yet, or half a file: it is counted and written below
    counts = _count_texts(store, table, tokenizer)
    if store.folder is not None:
        # They are only kept for the next time: a full disk, or an index of another user's, costs counting again.
        buffer = io.BytesIO()
        np.save(buffer, counts, allow_pickle=False)
        with suppress(OSError):
            write_bytes_atomically(store.folder / name, buffer.getvalue())
    return counts


def _count_texts(store: Store, table: SampleTable, tokenizer: Any) -> Indices:
    """Tokens of text of every sample of the index, by as many processes as it pays to start. Shapes: [len(store)]."""
    bounds = [(first, min(first + SAMPLES_AT_ONCE, len(store))) for first in range(0, len(store), SAMPLES_AT_ONCE)]
    processes = num_processes(len(store) // SAMPLES_PER_UNIT)
    if processes == 1 or store.folder is None:
        everything = whole_table(store, max_history=table.max_history, pad_history=table.pad_history)
        parts = [count_texts(everything[first:last], tokenizer.backend_tokenizer) for first, last in bounds]
        return np.concatenate([np.zeros(0, dtype=np.int64), *parts])
    with tempfile.TemporaryDirectory(prefix="janus-tokenizer-") as name:
        path = Path(name, "tokenizer.json")
        tokenizer.backend_tokenizer.save(str(path))
        tasks = [partial(count_rows, store.folder, b, table.max_history, table.pad_history, path) for b in bounds]
        return np.concatenate(list(run_tasks(tasks, processes)))


def _shortened_count(sample: Sample, count: int, tokenizer: Any, data: Data) -> int:
    """What is left after the dataset has dropped the oldest frames until the sample fits."""
    backend = tokenizer.backend_tokenizer
    image_tokens = count - sum(piece_lengths(sample_pieces(sample), backend)[p] for p in sample_pieces(sample))
    per_frame = image_tokens // len(sample.frames)
    while count > data.max_length and len(sample.frames) > 1:
        sample = sample.without_oldest_frame()
        pieces = sample_pieces(sample)
        lengths = piece_lengths(pieces, backend)
        count = sum(lengths[piece] for piece in pieces) + per_frame * len(sample.frames)
    return count


def _too_long_error(table: SampleTable, counts: Indices, too_long: Indices, data: Data, what: str) -> UsageError:
    lines = [f"{len(too_long)} of {len(table)} {what} have more tokens than data.max_length ({data.max_length})"]
    lines += [f"  {table[int(i)].id}: {counts[i]} tokens" for i in too_long[:TOO_LONG_SHOWN]]
    hint = f"--set data.max_length={int(counts.max())}, or lower data.history or image_width; a sample is never cut"
    if data.on_too_long == "fail":
        hint += "; --set data.on_too_long=shorten_history drops the oldest frames"
    return UsageError("\n".join(lines), hint=hint)
