"""Files of records are read one record after the other, and end as the whole parser would end them."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from data_files import write_frames
from hypothesis import given
from hypothesis import strategies as st

from janus_cluster.janusvln.data.formats import stream
from janus_cluster.janusvln.data.formats.registry import resolve_sources
from janus_cluster.janusvln.data.formats.source import BadUnitError
from janus_cluster.janusvln.data.formats.stream import RecordStream
from janus_cluster.janusvln.data.indexing import Reporter, load_stores
from janus_cluster.job.schema import Data
from tests.drawing import drawn

pytestmark = pytest.mark.slow


def read(path: Path, text: str) -> list[Any]:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return [record for _, record in RecordStream(path)]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text('é"\\\n[]{},:'),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=20,
)


@pytest.mark.parametrize("chunk_bytes", [1, 7, 1 << 20])
def test_records_are_those_of_the_whole_parser_wherever_the_text_is_cut(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(stream, "CHUNK_BYTES", chunk_bytes)

    @drawn(60)
    @given(records=st.lists(VALUES, max_size=5), indent=st.sampled_from([None, 1]), ensure_ascii=st.booleans())
    def read_both_ways(records, indent, ensure_ascii):
        text = json.dumps(records, indent=indent, ensure_ascii=ensure_ascii)
        assert read(tmp_path / "records.json", text) == records
        wrapped = json.dumps({"before": records, "episodes": records, "behind": 1}, indent=indent)
        assert read(tmp_path / "records.json.gz", wrapped) == records

    read_both_ways()


def test_a_text_that_ends_early_anywhere_is_refused(tmp_path):
    text = json.dumps({"a": [1], "episodes": [{"id": 1, "x": "é\\"}, 2.5, None, "s"], "z": {}})
    for end in range(len(text)):
        with pytest.raises(BadUnitError):
            read(tmp_path / "cut.json", text[:end])
    assert len(read(tmp_path / "cut.json", text)) == 4


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1 2]", "expected , or ], found 2: character 3"),
        ("[:3]", "character 1"),
        ('[{"a":1}] x', "something follows the end: character 10"),
        ('{"a" 1}', "expected :, found 1"),
        ("{}", "holds a dict, expected a list of records"),
        ('{"episodes": 3}', "holds a dict, expected a list of records"),
        ("3", "holds a int, expected a list of records"),
        ("", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_what_is_no_list_of_records_is_named(tmp_path, text, reason):
    with pytest.raises(BadUnitError, match=r"cannot be read|holds a") as caught:
        read(tmp_path / "data.json", text)
    assert reason in str(caught.value)


def test_damage_in_the_middle_is_found_without_reading_the_rest(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[{"a": 1}, {"a": oops}, ' + " " * (8 << 20) + "]")
    records = RecordStream(path)
    with pytest.raises(BadUnitError, match="character 17"):
        list(records)
    assert path.stat().st_size > 4 * stream.CHUNK_BYTES
    assert records.share_read() == 1.0  # the file is closed


def test_reading_a_file_needs_no_memory_for_what_was_read_before(tmp_path):
    """The peak of what Python holds, for a file and for one six times as long."""
    frames = write_frames(tmp_path / "walk", ["0.png"])
    peaks = []
    for count in (5_000, 30_000):
        path = tmp_path / f"{count}.json"
        turns = [{"from": "human", "value": "Go on. " * 100 + "<image>"}, {"from": "gpt", "value": "STOP"}]
        records = [{"id": f"walk/{n}", "conversations": turns, "images": [str(frames[0])]} for n in range(count)]
        path.write_text(json.dumps(records))
        del records
        tracemalloc.start()
        (store,) = load_stores(
            resolve_sources(Data(roots=[str(path)])), index_dir=tmp_path / "index", share=None, reporter=Reporter()
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(store) == count and path.stat().st_size > count * 700
    assert peaks[1] < 1.3 * peaks[0], peaks
