from __future__ import annotations

from pathlib import Path

import pytest

from janus_cluster.errors import UsageError
from janus_cluster.job.yamlfile import load_text, parse_leaves, parse_value, resolve_scalar, resolve_values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("2E5", 2e5),
        ("12:00:00", "12:00:00"),
        ("1-12:00", "1-12:00"),
        ("on", "on"),
        ("no", "no"),
        ("yes", "yes"),
        ("true", True),
        ("False", False),
        ("007", "007"),
        ("0", 0),
        ("-3", -3),
        ("1.", 1.0),
        (".5", 0.5),
        ("0x10", "0x10"),
        ("1_000", 1000),
        ("~", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
    ],
)
def test_scalars_are_read_by_yaml_1_2(text: str, value: object) -> None:
    read = resolve_scalar(text)
    assert read == value
    assert type(read) is type(value)


def test_values_keep_their_lines() -> None:
    leaves = parse_leaves("a: 1\nb:\n  c: [x, 1e-3]\n", label="j.yaml")
    assert leaves[("a",)].line == 1
    assert leaves[("b", "c")].value == ["x", "1e-3"]
    assert resolve_values(leaves[("b", "c")].value) == ["x", 1e-3]
    assert leaves[("b", "c")].line == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2\n", ["j.yaml:2", "a: duplicate key", "line 1"]),
        ("b:\n  c: 1\n  c: 2\n", ["j.yaml:3", "b.c: duplicate key"]),
        ("a: [{x: 1, x: 2}]\n", ["x: duplicate key"]),
        ("a:\n\tb: 1\n", ["j.yaml:2", "a tab"]),
        ("a: {<<: 3}\n", ["j.yaml:1", "a.<<", "takes a mapping"]),
        ("- 1\n", ["j.yaml:1", "mapping"]),
        ("", ["empty"]),
        ("a: [1\n", ["j.yaml", "not readable as YAML"]),
        ("a: b: c\n", ["j.yaml:1", "not readable as YAML"]),
    ],
)
def test_bad_documents_name_file_and_line(text: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_leaves(text, label="j.yaml")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("data", "word"), [(b"\x89PNG\r\n\x1a\n", "not UTF-8"), (b"name: a\0b", "NUL"), (None, "no such file")]
)
def test_files_that_are_no_text_are_refused(tmp_path: Path, data: bytes | None, word: str) -> None:
    path = tmp_path / "job.yaml"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UsageError, match=word):
        load_text(path, label="job.yaml")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load_text(tmp_path, label="job.yaml")


def test_set_values_may_be_lists_and_mappings() -> None:
    assert parse_value("[/a, /b]") == ["/a", "/b"]
    assert resolve_values(parse_value("{x: 1e-3, y: '1e-3'}")) == {"x": 1e-3, "y": "1e-3"}
    assert parse_value("'12'") == "12"
    assert parse_value("a: b") == "a: b"


def test_merge_keys_give_what_the_mapping_does_not_give_itself() -> None:
    text = "a: &a {x: 1, y: {z: 1}}\nb: &b {w: 5, x: 6}\nc:\n  x: 2\n  <<: [*a, *b]\nd: [{<<: *b, w: 7}]\n"
    values = {key: resolve_values(leaf.value) for key, leaf in parse_leaves(text, label="j.yaml").items()}
    assert {key[1:]: value for key, value in values.items() if key[0] == "c"} == {("x",): 2, ("y", "z"): 1, ("w",): 5}
    assert values[("d",)] == [{"w": 7, "x": 6}]
