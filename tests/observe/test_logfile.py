from __future__ import annotations

import os
import time
import tracemalloc
from pathlib import Path

import pytest

from janus_cluster.observe import logfile
from janus_cluster.observe.logfile import GrowingFile, LineFilter, LogLine
from janus_cluster.run.stamped import render_stamp


def keep_all(_line: LogLine) -> bool:
    return True


def texts(lines: list[LogLine]) -> list[str]:
    return [line.text for line in lines]


def read_new(file: GrowingFile) -> tuple[list[str], bool]:
    lines, was_cut = file.read_new()
    return texts(lines), was_cut


def read_partial(file: GrowingFile, *, at_end: bool) -> list[str]:
    return texts(file.read_partial(at_end=at_end))


def start_at_end(file: GrowingFile, num_lines: int, keep: LineFilter = keep_all) -> list[str]:
    return texts(file.start_at_end(num_lines, keep))


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as f:
        f.write(data)


def test_only_appended_lines_come_at_the_next_look(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    append(path, b"one\ntwo\n")
    file = GrowingFile(path)
    assert read_new(file) == (["one", "two"], False)
    assert read_new(file) == ([], False)
    append(path, b"three\n")
    assert read_new(file) == (["three"], False)


def test_unfinished_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    append(path, b"half a ")
    file = GrowingFile(path)
    assert read_new(file)[0] == []
    assert read_partial(file, at_end=False) == []
    append(path, b"line\n")
    assert read_new(file)[0] == ["half a line"]


def test_unfinished_line_is_shown_at_the_end_and_when_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.log"
    append(path, b"Killed")
    file = GrowingFile(path)
    read_new(file)
    assert read_partial(file, at_end=True) == ["Killed"]
    assert read_partial(file, at_end=True) == []
    monkeypatch.setattr(logfile, "IDLE_S", 0.0)
    append(path, b"prompt> ")
    read_new(file)
    assert read_partial(file, at_end=False) == ["prompt> "]


def test_half_a_character_waits_for_its_other_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logfile, "IDLE_S", 0.0)
    path = tmp_path / "a.log"
    block = "█".encode()
    append(path, b"bar " + block[:2])
    file = GrowingFile(path)
    read_new(file)
    assert read_partial(file, at_end=False) == ["bar "]
    append(path, block[2:] + b"\n")
    assert read_new(file)[0] == ["█"]


def test_file_that_was_cut_short_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    append(path, b"a long first line\nand its rest")
    file = GrowingFile(path)
    read_new(file)
    path.write_bytes(b"new\n")
    assert read_new(file) == (["new"], True)


def test_file_that_was_replaced_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    append(path, b"old\n")
    file = GrowingFile(path)
    read_new(file)
    (tmp_path / "b").write_bytes(b"new 1\nnew 2\n")
    (tmp_path / "b").replace(path)
    assert read_new(file) == (["new 1", "new 2"], True)


def test_binary_bytes_and_terminal_commands_become_harmless_text(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    append(path, b"\x1b[31mred\x1b[0m \x1b]0;title\x07\xff\xfe\x00\x08end\ttab\n")
    lines, _ = read_new(GrowingFile(path))
    assert lines == ["red \ufffd\ufffdend\ttab"]


def test_progress_bar_shows_its_last_version_only(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    append(path, b" 10%\r 50%\r100%\nwindows line\r\n")
    assert read_new(GrowingFile(path))[0] == ["100%", "windows line"]


@pytest.mark.slow
def test_endless_line_stays_within_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    with path.open("wb") as f:
        f.truncate(64 * 1024 * 1024)
    file = GrowingFile(path)
    tracemalloc.start()
    while read_new(file)[0]:
        pass
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert file.offset == 64 * 1024 * 1024
    assert peak_bytes < 32 * 1024 * 1024


def test_missing_file_has_no_lines_yet(tmp_path: Path) -> None:
    file = GrowingFile(tmp_path / "later.log")
    assert start_at_end(file, 5) == []
    assert read_new(file) == ([], False)
    append(file.path, b"now\n")
    assert read_new(file)[0] == ["now"]


@pytest.mark.parametrize("num_lines", [0, 1, 3, 10_000])
def test_start_at_end_gives_the_last_lines_and_goes_on_after_them(tmp_path: Path, num_lines: int) -> None:
    path = tmp_path / "a.log"
    append(path, b"".join(b"line %d\n" % i for i in range(5000)) + b"unfinished")
    file = GrowingFile(path)
    expected = [f"line {i}" for i in range(5000)][-num_lines:] if num_lines else []
    assert start_at_end(file, num_lines) == expected
    append(path, b" no more\n")
    assert read_new(file)[0] == ["unfinished no more"]


def test_start_at_end_looks_further_back_for_lines_that_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    append(path, b"needle\n" + b"hay\n" * 200_000)
    assert start_at_end(GrowingFile(path), 1, lambda line: line.text == "needle") == ["needle"]


def test_start_at_end_of_a_huge_file_reads_little_of_it(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    with path.open("wb") as f:
        f.truncate(2 * 1024 * 1024 * 1024)
        f.seek(0, os.SEEK_END)
        f.write(b"\nlast\n")
    file = GrowingFile(path)
    tracemalloc.start()
    assert start_at_end(file, 1) == ["last"]
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 64 * 1024 * 1024


def stamped(seconds: float, text: str) -> bytes:
    return f"{render_stamp(seconds)} {text}\n".encode()


def at(path: Path, seconds: float) -> None:
    os.utime(path, (seconds, seconds))


NOW = 1_795_269_703.0


def test_a_line_has_its_own_time_or_that_of_the_line_before(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    append(path, stamped(NOW, "one") + b"of C code\n" + stamped(NOW + 2.5, "two"))
    at(path, NOW + 9)
    expected = [LogLine(NOW, "one", True), LogLine(NOW, "of C code"), LogLine(NOW + 2.5, "two", True)]
    assert GrowingFile(path).read_new()[0] == expected
    assert GrowingFile(path).start_at_end(9, keep_all) == expected


def test_the_last_lines_of_a_file_are_as_old_as_its_last_change(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    append(path, stamped(NOW, "one") + b"Killed\n")
    at(path, NOW + 3600)
    expected = [LogLine(NOW, "one", True), LogLine(NOW + 3600, "Killed")]
    assert GrowingFile(path).start_at_end(9, keep_all) == expected
    assert GrowingFile(path).read_new()[0] == expected


@pytest.mark.parametrize(
    "form",
    [
        "[W%m%d %H:%M:%S.299042991 socket.cpp:207] [c10d] The hostname",
        "[rank3]:[E%m%d %H:%M:%S.299042 ProcessGroupNCCL.cpp:629] Watchdog",
        "W%m%d %H:%M:%S.299000 4711 torch/distributed/run.py:774] Setting",
        "slurmstepd-h800-01: error: *** JOB 7 ON h800-01 CANCELLED AT %Y-%m-%dT%H:%M:%S DUE TO TIME LIMIT ***",
        "[%Y-%m-%dT%H:%M:%S.345] error: *** JOB 7 ON h800-01 CANCELLED AT %Y-%m-%dT%H:%M:%S DUE TO TIME LIMIT ***",
    ],
)
def test_a_time_that_glog_or_slurm_wrote_counts_unless_it_cannot_be(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a.log"
    other = time.strftime(form, time.localtime(NOW + 60)).encode() + b"\n"
    append(path, stamped(NOW, "one") + other + stamped(NOW + 99, "two"))
    at(path, NOW + 100)
    assert [line.time - NOW for line in GrowingFile(path).read_new()[0]] == [0, pytest.approx(60.3, abs=0.31), 99]
    # Of another time zone: before the line before it, or after the file's last change.
    for hours in (-3, 3):
        path.write_bytes(stamped(NOW, "one"))
        append(path, time.strftime(form, time.localtime(NOW + 3600 * hours)).encode() + b"\n" + stamped(NOW + 9, "two"))
        at(path, NOW + 100)
        assert [line.time - NOW for line in GrowingFile(path).read_new()[0]] == [0, 0, 9]


def test_a_bar_that_is_not_finished_keeps_the_time_of_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    append(path, stamped(NOW, "\r 10%\r 20%").rstrip(b"\n"))
    file = GrowingFile(path)
    assert file.read_new()[0] == []
    append(path, b"\r 30%\n")
    assert file.read_new()[0] == [LogLine(NOW, " 30%", True)]


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("since", [-5.0, 0.0, 0.5, 4999.2, 70_000.0, 199_999.0, 200_001.0])
def test_reading_begins_at_a_time_without_reading_what_is_older(tmp_path: Path, since: float) -> None:
    path = tmp_path / "a.log"
    with path.open("wb") as f:
        for i in range(0, 200_000, 5):
            f.write(stamped(NOW + i, f"line {i} " + "x" * 150) + b"of C code\n")
    at(path, NOW + 199_995)
    before = bytes_read()
    file = GrowingFile(path)
    file.start_at_time(NOW + since)
    lines = file.read_new()[0]
    assert bytes_read() - before < 1.5 * 1024 * 1024 < path.stat().st_size / 4
    first = max(0, -(-since // 5) * 5)
    assert lines[0].text.startswith(f"line {first:.0f} ") if first < 200_000 else lines == []


def test_a_time_is_found_though_others_wrote_much_without_one(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    flood = b"words of C code, without a time\n" * 60_000
    with path.open("wb") as f:
        for i in range(12):
            f.write(stamped(NOW + i, f"block {i}") + flood)
        f.write(stamped(NOW + 12, "end"))
    at(path, NOW + 12)
    file = GrowingFile(path)
    file.start_at_time(NOW + 10)
    size = path.stat().st_size
    assert file.offset >= size - 3 * len(flood) - 1000, "what is older is not read line by line"
    looks = (file.read_new()[0] for _ in range(2 * len(flood) // logfile.MAX_READ_BYTES))
    assert next(lines for lines in looks if lines)[0].text == "block 10"


def test_a_file_without_times_begins_near_its_end_where_a_time_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    with path.open("wb") as f:
        f.truncate(300 * 1024 * 1024)
        f.seek(0, os.SEEK_END)
        f.write(b"\nlast\n")
    file = GrowingFile(path)
    file.start_at_time(path.stat().st_mtime - 60)
    assert file.offset >= path.stat().st_size - logfile.MAX_BACK_BYTES
    old = GrowingFile(path)
    old.start_at_time(path.stat().st_mtime + 60)
    assert old.read_new()[0] == []


def test_a_look_takes_a_piece_and_shows_that_there_is_more(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    append(path, b"x" * 99 + b"\n")
    append(path, (b"y" * 99 + b"\n") * 5000)
    file = GrowingFile(path)
    looks = []
    while not looks or file.has_more:
        looks.append(len(file.read_new()[0]))
    assert len(looks) == 2 and sum(looks) == 5001
