from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest

from janus_cluster.observe import logfile
from janus_cluster.observe.logfile import GrowingFile


def keep_all(_line: str) -> bool:
    return True


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as f:
        f.write(data)


def test_only_appended_lines_come_at_the_next_look(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    append(path, b"one\ntwo\n")
    file = GrowingFile(path)
    assert file.read_new() == (["one", "two"], False)
    assert file.read_new() == ([], False)
    append(path, b"three\n")
    assert file.read_new() == (["three"], False)


def test_unfinished_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    append(path, b"half a ")
    file = GrowingFile(path)
    assert file.read_new()[0] == []
    assert file.read_partial(at_end=False) == []
    append(path, b"line\n")
    assert file.read_new()[0] == ["half a line"]


def test_unfinished_line_is_shown_at_the_end_and_when_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.log"
    append(path, b"Killed")
    file = GrowingFile(path)
    file.read_new()
    assert file.read_partial(at_end=True) == ["Killed"]
    assert file.read_partial(at_end=True) == []
    monkeypatch.setattr(logfile, "IDLE_S", 0.0)
    append(path, b"prompt> ")
    file.read_new()
    assert file.read_partial(at_end=False) == ["prompt> "]


def test_half_a_character_waits_for_its_other_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logfile, "IDLE_S", 0.0)
    path = tmp_path / "a.log"
    block = "█".encode()
    append(path, b"bar " + block[:2])
    file = GrowingFile(path)
    file.read_new()
    assert file.read_partial(at_end=False) == ["bar "]
    append(path, block[2:] + b"\n")
    assert file.read_new()[0] == ["█"]


def test_file_that_was_cut_short_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    append(path, b"a long first line\nand its rest")
    file = GrowingFile(path)
    file.read_new()
    path.write_bytes(b"new\n")
    assert file.read_new() == (["new"], True)


def test_file_that_was_replaced_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    append(path, b"old\n")
    file = GrowingFile(path)
    file.read_new()
    (tmp_path / "b").write_bytes(b"new 1\nnew 2\n")
    (tmp_path / "b").replace(path)
    assert file.read_new() == (["new 1", "new 2"], True)


def test_binary_bytes_and_terminal_commands_become_harmless_text(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    append(path, b"\x1b[31mred\x1b[0m \x1b]0;title\x07\xff\xfe\x00\x08end\ttab\n")
    lines, _ = GrowingFile(path).read_new()
    assert lines == ["red \ufffd\ufffdend\ttab"]


def test_progress_bar_shows_its_last_version_only(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    append(path, b" 10%\r 50%\r100%\nwindows line\r\n")
    assert GrowingFile(path).read_new()[0] == ["100%", "windows line"]


@pytest.mark.slow
def test_endless_line_stays_within_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    with path.open("wb") as f:
        f.truncate(64 * 1024 * 1024)
    file = GrowingFile(path)
    tracemalloc.start()
    while file.read_new()[0]:
        pass
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert file.offset == 64 * 1024 * 1024
    assert peak_bytes < 32 * 1024 * 1024


def test_missing_file_has_no_lines_yet(tmp_path: Path) -> None:
    file = GrowingFile(tmp_path / "later.log")
    assert file.start_at_end(5, keep_all) == []
    assert file.read_new() == ([], False)
    append(file.path, b"now\n")
    assert file.read_new()[0] == ["now"]


@pytest.mark.parametrize("num_lines", [0, 1, 3, 10_000])
def test_start_at_end_gives_the_last_lines_and_goes_on_after_them(tmp_path: Path, num_lines: int) -> None:
    path = tmp_path / "a.log"
    append(path, b"".join(b"line %d\n" % i for i in range(5000)) + b"unfinished")
    file = GrowingFile(path)
    expected = [f"line {i}" for i in range(5000)][-num_lines:] if num_lines else []
    assert file.start_at_end(num_lines, keep_all) == expected
    append(path, b" no more\n")
    assert file.read_new()[0] == ["unfinished no more"]


def test_start_at_end_looks_further_back_for_lines_that_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    append(path, b"needle\n" + b"hay\n" * 200_000)
    assert GrowingFile(path).start_at_end(1, lambda line: line == "needle") == ["needle"]


def test_start_at_end_of_a_huge_file_reads_little_of_it(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    with path.open("wb") as f:
        f.truncate(2 * 1024 * 1024 * 1024)
        f.seek(0, os.SEEK_END)
        f.write(b"\nlast\n")
    file = GrowingFile(path)
    tracemalloc.start()
    assert file.start_at_end(1, keep_all) == ["last"]
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 64 * 1024 * 1024
