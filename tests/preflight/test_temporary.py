"""The temporary folder of a node: real sockets, real mappings, a real noexec mount; judged at and beside the floor."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_fault_matrix import small_tmpfs, unmount

from janus_cluster.preflight.temporary import (
    GIB,
    choose_temporary,
    judge_temporary,
    read_temporary,
    temporary_folder,
)
from janus_cluster.run.records.verdict import CheckResult

FLOOR = {"fail_below": 1, "source": "a test"}
SOCKET = {"socket": "no Unix socket can be made there"}
EXEC = {"exec": "nothing can be run from it (mounted noexec)"}


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path leaves room for a socket's name."""
    folder = Path("/tmp") / "janus-test-temporary"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def tried(path: str, faults: dict[str, str] | None = None, *, free_gib: float = 5) -> dict[str, Any]:
    return {"path": path, "faults": faults or {}, "free_bytes": round(free_gib * GIB)}


def judge(*facts: dict[str, Any], compiles: bool = True) -> CheckResult:
    return judge_temporary(facts, FLOOR, node="n1", compiles=compiles)


def test_a_sound_folder_is_the_only_one_that_is_tried_and_nothing_is_left_in_it(short: Path) -> None:
    (fact,) = read_temporary({"TMPDIR": str(short)})
    assert (fact["path"], fact["faults"]) == (str(short), {}) and fact["free_bytes"] > 0
    assert list(short.iterdir()) == []


def test_the_variables_are_looked_up_in_pythons_order() -> None:
    assert temporary_folder({"TMP": "/c", "TEMP": "/b", "TMPDIR": "/a"}) == "/a"
    assert temporary_folder({"TMP": "/c", "TEMP": "/b", "TMPDIR": ""}) == "/b"
    assert temporary_folder({}) == "/tmp"


@pytest.mark.parametrize("length", [75, 76])
def test_a_path_is_too_long_where_multiprocessings_socket_has_more_than_107_bytes(short: Path, length: int) -> None:
    folder = short / ("x" * (length - len(str(short)) - 1))
    folder.mkdir()
    own, *others = read_temporary({"TMPDIR": str(folder)}, instead=[str(short)])
    if length == 75:
        assert own["faults"] == {} and others == []
    else:
        assert "AF_UNIX path too long (108 bytes with its name)" in own["faults"]["socket"]
        assert [fact["path"] for fact in others] == [str(short)]


def test_a_noexec_mount_is_found_by_mapping_a_file(short: Path) -> None:
    small_tmpfs(short, "600k", "noexec")
    try:
        own, *_ = read_temporary({"TMPDIR": str(short)}, instead=[])
    finally:
        unmount(short)
    assert own["faults"] == EXEC


def test_a_folder_that_is_not_there_is_named_with_the_reason(short: Path) -> None:
    (own,) = read_temporary({"TMPDIR": str(short / "absent")}, instead=[])
    assert "No such file or directory" in own["faults"]["socket"]


def test_the_first_that_serves_is_chosen_and_sockets_matter_more_than_code() -> None:
    long, plain, sound = tried("/long", SOCKET), tried("/noexec", EXEC), tried("/sound")
    assert choose_temporary([long, plain, sound]) == sound
    assert choose_temporary([long, plain]) == plain
    assert choose_temporary([plain, long]) == plain
    assert choose_temporary([long]) is None


def test_another_folder_for_the_ranks_is_a_warning_with_both_paths() -> None:
    result = judge(tried("/long", SOCKET), tried("/tmp"))
    assert (result.id, result.state) == ("limits.tmp", "WARN")
    assert "/long: no Unix socket" in result.measured and "a private folder in /tmp" in result.measured
    assert "environment.variables.TMPDIR" in result.fix


def test_no_folder_that_serves_fails_and_names_all() -> None:
    result = judge(tried("/long", SOCKET), tried("/tmp", SOCKET))
    assert result.state == "FAIL" and "nor does /tmp serve" in result.measured


def test_noexec_everywhere_fails_only_where_something_is_compiled() -> None:
    assert judge(tried("/tmp", EXEC), tried("/var/tmp", EXEC)).state == "FAIL"
    assert judge(tried("/tmp", EXEC), tried("/var/tmp", EXEC), compiles=False).state == "WARN"


@pytest.mark.parametrize(("free_gib", "state"), [(0.99, "FAIL"), (1, "PASS"), (1.01, "PASS")])
def test_room_is_judged_at_the_floor(free_gib: float, state: str) -> None:
    assert judge(tried("/tmp", free_gib=free_gib)).state == state


def test_a_full_folder_is_reported_with_the_line_to_look() -> None:
    result = judge(tried("/long", SOCKET), tried("/tmp", free_gib=0.1))
    assert result.state == "FAIL" and "df -h /tmp" in result.fix
