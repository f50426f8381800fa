"""How many tokens the texts of samples have. Apart from lengths.py so that processes without torch can count them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from janus_cluster.janusvln.data.prompt import render_conversation, render_target_parts
from janus_cluster.janusvln.data.samples import Sample
from janus_cluster.janusvln.data.store import Store, load_store
from janus_cluster.janusvln.data.table import Indices, SampleTable


def count_rows(
    folder: Path, rows: tuple[int, int], max_history: int, pad_history: bool, tokenizer_json: Path
) -> Indices:
    """Tokens of text of the rows from `rows[0]` to before `rows[1]` of the index in `folder`. Shapes: [rows]."""
    table = whole_table(_open_store(folder), max_history=max_history, pad_history=pad_history)
    return count_texts(table[slice(*rows)], _open_tokenizer(tokenizer_json))


def whole_table(store: Store, *, max_history: int, pad_history: bool) -> SampleTable:
    """Every sample of an index, usable or not."""
    return SampleTable(
        stores=(store,),
        root_index=np.zeros(len(store), dtype=np.int64),
        rows=np.arange(len(store), dtype=np.int64),
        max_history=max_history,
        pad_history=pad_history,
    )


def count_texts(table: SampleTable, tokenizer: Any) -> Indices:
    """Tokens of text of each sample. `tokenizer` is one of the tokenizers library. Shapes: [N]."""
    texts = [sample_pieces(sample) for sample in table.outlines()]
    lengths = piece_lengths((piece for pieces in texts for piece in pieces), tokenizer)
    return np.array([sum(lengths[piece] for piece in pieces) for pieces in texts], dtype=np.int64)


def sample_pieces(sample: Sample) -> list[str]:
    """The stretches of text that the encoder tokenises one by one."""
    pieces = [*render_conversation(sample), *(part.text for part in render_target_parts(sample))]
    return [piece for piece in pieces if piece]


def piece_lengths(pieces: Iterable[str], tokenizer: Any) -> dict[str, int]:
    """Tokens of each distinct piece. `tokenizer` is one of the tokenizers library."""
    distinct = list(dict.fromkeys(pieces))
    # The batch call of the tokenizer's own library: no arrays, no masks.
    encoded = tokenizer.encode_batch_fast(distinct, add_special_tokens=False)
    return {piece: len(found.ids) for piece, found in zip(distinct, encoded, strict=True)}


@lru_cache(maxsize=1)
def _open_store(folder: Path) -> Store:
    return load_store(folder)


@lru_cache(maxsize=1)
def _open_tokenizer(path: Path) -> Any:
    # Seconds to import and megabytes to parse: neither is wanted in a process that reads data only.
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))
