from __future__ import annotations

import pytest

from janus_cluster.observe.logfile import LogLine
from janus_cluster.observe.merge import Merge
from janus_cluster.observe.tail_view import LogSource, render_label


def rank(number: int, *, node: int = 1, attempt: int = 1) -> LogSource:
    return LogSource(attempt=attempt, node=f"h800-{node:02d}", rank=number)


def agent(node: int) -> LogSource:
    return LogSource(attempt=1, node=f"h800-{node:02d}", rank=None)


def shown(merge: Merge, **options: float | bool) -> list[tuple[str, str]]:
    return [(render_label(g.sources), g.text) for g in merge.take(**{"now": 0.0, "everything": True} | options)]  # type: ignore[arg-type]


def test_lines_of_several_files_come_by_their_times() -> None:
    merge = Merge()
    merge.add(rank(0), [LogLine(1, "a"), LogLine(4, "d")], now=0)
    merge.add(rank(8, node=2), [LogLine(2, "b"), LogLine(3, "c")], now=0)
    assert [text for _, text in shown(merge)] == ["a", "b", "c", "d"]


def test_lines_of_one_file_keep_their_order_for_any_times() -> None:
    merge = Merge()
    merge.add(rank(0), [LogLine(5, "first"), LogLine(3, "second")], now=0)
    merge.add(rank(1), [LogLine(4, "other")], now=0)
    assert [text for _, text in shown(merge)] == ["other", "first", "second"]


def test_equal_lines_of_all_ranks_are_one_line_with_all_of_them() -> None:
    merge = Merge()
    for number in range(16):
        merge.add(rank(number, node=1 + number // 8), [LogLine(1 + number / 10, "the same")], now=0)
    merge.add(agent(1), [LogLine(1, "the same")], now=0)
    groups = merge.take(now=0, everything=True)
    assert [(render_label(g.sources), len(g.sources)) for g in groups] == [("h800-01", 1), ("h800-01,02:0-15", 16)]


def test_a_rank_that_prints_it_twice_is_counted_in_two_lines() -> None:
    merge = Merge()
    merge.add(rank(0), [LogLine(1, "again"), LogLine(1.1, "between"), LogLine(1.2, "again")], now=0)
    merge.add(rank(1), [LogLine(1.05, "again"), LogLine(1.3, "again")], now=0)
    assert shown(merge) == [("h800-01:0-1", "again"), ("h800-01:0", "between"), ("h800-01:0-1", "again")]


@pytest.mark.parametrize(("later_s", "num_lines"), [(1.9, 1), (2.0, 1), (2.1, 2)])
def test_equal_lines_further_apart_than_the_window_are_two(later_s: float, num_lines: int) -> None:
    merge = Merge()
    merge.add(rank(0), [LogLine(10, "same")], now=0)
    merge.add(rank(1), [LogLine(10 + later_s, "same")], now=0)
    assert len(shown(merge)) == num_lines


def test_equal_lines_of_two_attempts_are_two() -> None:
    merge = Merge()
    merge.add(rank(0), [LogLine(10, "same")], now=0)
    merge.add(rank(1, attempt=2), [LogLine(10, "same")], now=0)
    assert len(shown(merge)) == 2


def test_the_time_and_rank_that_c10d_writes_make_no_difference() -> None:
    merge = Merge()
    merge.add(rank(0), [LogLine(1, "[rank0]:[W1121 14:01:20.299042991 socket.cpp:207] no name")], now=0)
    merge.add(rank(1), [LogLine(1, "[rank1]:[W1121 14:01:20.312345678 socket.cpp:207] no name")], now=0)
    assert [label for label, _ in shown(merge)] == ["h800-01:0-1"]


def test_a_line_waits_for_others_and_is_then_shown_with_them() -> None:
    merge = Merge(hold_s=1.0)
    merge.add(rank(0), [LogLine(10, "same")], now=0)
    assert shown(merge, now=0.5, everything=False) == []
    merge.add(rank(1), [LogLine(10.4, "same"), LogLine(10.5, "later")], now=0.6)
    assert shown(merge, now=1.0, everything=False) == [("h800-01:0-1", "same")]
    assert shown(merge, now=1.6, everything=False) == [("h800-01:1", "later")]
    assert shown(merge) == []


def test_nothing_is_taken_that_a_file_that_is_behind_could_precede() -> None:
    merge = Merge()
    merge.add(rank(0), [LogLine(1, "a"), LogLine(5, "e")], now=0)
    merge.add(rank(1), [LogLine(2, "b")], now=0)
    assert [text for _, text in shown(merge, until=2.0)] == ["a", "b"]
    merge.add(rank(1), [LogLine(3, "c")], now=0, read_to=4)
    assert merge.newest_of(rank(1)) == 4, "lines that are not shown are read nevertheless"
    assert [text for _, text in shown(merge)] == ["c", "e"]


def test_raw_lines_are_not_put_together() -> None:
    merge = Merge(collapses=False)
    for number in range(3):
        merge.add(rank(number), [LogLine(1, "same")], now=0)
    assert len(shown(merge)) == 3


@pytest.mark.parametrize(
    ("sources", "label"),
    [
        ([LogSource(attempt=0, node=None, rank=None)], "batch"),
        ([agent(2)], "h800-02"),
        ([agent(2), agent(1)], "h800-01,02"),
        ([rank(3)], "h800-01:3"),
        ([rank(0), rank(1), rank(2), rank(5), rank(9, node=2)], "h800-01,02:0-2,5,9"),
        ([LogSource(attempt=1, node=n, rank=None) for n in ("alpha", "beta")], "alpha,beta"),
        ([LogSource(attempt=1, node=n, rank=None) for n in ("a1", "b1")], "a1,b1"),
    ],
)
def test_labels_are_short_and_name_everybody(sources: list[LogSource], label: str) -> None:
    assert render_label(sources) == label
