from __future__ import annotations

from pathlib import Path

import pytest

from janus_cluster.node.watchdog import Beat, Watchdog, judge_progress
from janus_cluster.run.files import write_json_atomically
from janus_cluster.run.paths import RunDir

LIMIT_S = 60.0


def beat(rank: int, *, step: int = 7, doing: str = "step", alive_s: float = 100, progress_s: float = 40) -> Beat:
    return Beat(
        rank=rank,
        node=f"h800-{rank // 8 + 1:02d}",
        doing=doing,
        step=step,
        has_begun=step > 0,
        alive_s=alive_s,
        progress_s=progress_s,
    )


def judge(*beats: Beat, now_s: float = 100.0) -> tuple[int | None, str | None, str] | None:
    hang = judge_progress(
        {b.rank: b for b in beats}, now_s=now_s, hang_timeout_s=LIMIT_S, start_timeout_s=600, silence_s=20
    )
    return hang and (hang.rank, hang.node, hang.message)


@pytest.mark.parametrize(("now_s", "is_hang"), [(99.9, False), (100.0, True), (100.1, True)])
def test_the_limit_is_time_without_progress_of_any_rank(now_s: float, is_hang: bool) -> None:
    assert (judge(beat(0), beat(1, progress_s=30), now_s=now_s) is not None) is is_hang


def test_the_first_step_may_take_longer() -> None:
    ranks = (beat(0, doing="start", step=0), beat(1, doing="data", step=0))
    assert judge(*ranks, now_s=639) is None
    found = judge(*ranks, now_s=640)
    assert found is not None and "before the first step" in found[2]


def test_a_rank_that_fell_silent_before_it_could_tell_of_its_first_step_does_not_count_as_starting() -> None:
    found = judge(beat(0, step=5), beat(1, step=0, doing="start", alive_s=60))
    assert found is not None and found[:2] == (1, "h800-01")
    assert "step 5" in found[2] and "no sign of life since start" in found[2]


def test_a_rank_whose_process_is_silent_is_named_and_not_those_that_wait_for_it() -> None:
    found = judge(*(beat(r, alive_s=60 if r == 11 else 99) for r in range(16)))
    assert found is not None
    assert found[:2] == (11, "h800-02")
    assert "rank 11 on h800-02 gives no sign of life" in found[2]


def test_all_ranks_of_a_silent_node_name_the_node() -> None:
    found = judge(*(beat(r, alive_s=60 if r >= 8 else 99) for r in range(16)))
    assert found is not None and found[1] == "h800-02"


def test_the_rank_that_is_behind_is_named_where_all_live() -> None:
    assert judge(beat(0), beat(1, step=6), beat(2)) is not None
    found = judge(beat(0), beat(1, step=6), beat(2))
    assert found is not None and found[0] == 1
    found = judge(beat(0, doing="agreement"), beat(1, doing="data"), beat(2, doing="agreement"))
    assert found is not None and found[0] == 1 and "data of step 7" in found[2]


def test_no_rank_is_blamed_where_nothing_distinguishes_them() -> None:
    found = judge(beat(0), beat(1))
    assert found is not None and found[:2] == (None, None)


def test_nothing_is_reported_before_the_first_heartbeat() -> None:
    assert judge() is None


def test_ranks_that_never_begin_are_noticed(tmp_path: Path) -> None:
    now = [0.0]
    watchdog = Watchdog(
        RunDir(tmp_path), attempt=1, world_size=2, hang_timeout_s=40, start_timeout_s=600, clock=lambda: now[0]
    )
    hang = None
    for t in range(0, 601, 10):
        now[0] = float(t)
        hang = watchdog.look()
        assert (hang is not None) is (t >= 600), t
    assert hang is not None and "no rank has begun in 600 s" in hang.message


def test_only_changes_by_the_watchers_own_clock_count(tmp_path: Path) -> None:
    run, now = RunDir(tmp_path), [0.0]
    watchdog = Watchdog(run, attempt=1, world_size=2, hang_timeout_s=40, start_timeout_s=600, clock=lambda: now[0])

    def write(rank: int, count: int, time_s: float) -> None:
        path = run.heartbeat_json(1, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        who = {"rank": rank, "node": f"n{rank}", "doing": "step", "step": 3, "has_begun": True}
        write_json_atomically(path, who | {"count": count, "time": time_s})

    # Node n1's clock is an hour ahead; from 20 s on both stand still and rank 1 is silent, too.
    for t in range(0, 70, 10):
        now[0] = float(t)
        write(0, min(t, 20), 1000.0 + t)
        write(1, min(t, 20), 4600.0 + min(t, 20))
        hang = watchdog.look()
        assert (hang is not None) is (t >= 60), t
    assert hang is not None and (hang.rank, hang.node) == (1, "n1")


def write_beat(run: RunDir, rank: int, count: int, *, step: int = 3, time_s: float = 0.0) -> None:
    path = run.heartbeat_json(1, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    who = {"rank": rank, "node": f"n{rank}", "doing": "step", "step": step, "has_begun": count > 0}
    write_json_atomically(path, who | {"count": count, "time": time_s})


def test_a_job_that_was_suspended_for_hours_is_not_taken_for_a_hung_one(tmp_path: Path) -> None:
    run, now = RunDir(tmp_path), [0.0]
    watchdog = Watchdog(run, attempt=1, world_size=1, hang_timeout_s=40, start_timeout_s=600, clock=lambda: now[0])
    write_beat(run, 0, 1)
    for now[0] in (10.0, 20.0, 30.0, 7230.0):
        assert watchdog.look() is None
    # From then on it counts again: 20 s before, 10 s for the gap, and these.
    now[0] = 7240.0
    assert watchdog.look() is not None


def test_while_the_run_folder_cannot_be_written_no_rank_is_taken_for_hung(tmp_path: Path) -> None:
    run, now = RunDir(tmp_path), [0.0]
    watchdog = Watchdog(run, attempt=1, world_size=1, hang_timeout_s=40, start_timeout_s=600, clock=lambda: now[0])
    write_beat(run, 0, 1)
    for t in range(10, 600, 10):
        now[0] = float(t)
        assert watchdog.look(is_blind=True) is None
    for t in range(600, 640, 10):
        now[0] = float(t)
        assert (watchdog.look() is not None) is (t >= 630), t


def test_ranks_that_never_began_are_named_and_not_those_that_wait_for_them(tmp_path: Path) -> None:
    run, now = RunDir(tmp_path), [0.0]
    watchdog = Watchdog(run, attempt=1, world_size=4, hang_timeout_s=40, start_timeout_s=100, clock=lambda: now[0])
    for rank in (0, 1):
        write_beat(run, rank, 0)
    hang = None
    for t in range(10, 120, 10):
        now[0] = float(t)
        hang = hang or watchdog.look()
    assert hang is not None and hang.message.endswith("rank 2, 3 never began")


def test_a_heartbeat_that_is_seen_late_through_nfs_names_no_wrong_node(tmp_path: Path) -> None:
    run, now = RunDir(tmp_path), [0.0]
    watchdog = Watchdog(run, attempt=1, world_size=3, hang_timeout_s=300, start_timeout_s=600, clock=lambda: now[0])
    # Rank 2 is behind. Rank 1 lives on another node, and this one sees its file as it was a minute ago.
    hang = None
    for t in range(10, 320, 10):
        now[0] = float(t)
        for rank in range(3):
            write_beat(run, rank, 1, step=6 if rank == 2 else 7, time_s=min(t, 250) if rank == 1 else t)
        hang = watchdog.look()
    assert hang is not None and hang.rank == 2


def test_half_a_heartbeat_file_changes_nothing(tmp_path: Path) -> None:
    run, now = RunDir(tmp_path), [0.0]
    watchdog = Watchdog(run, attempt=1, world_size=1, hang_timeout_s=8, start_timeout_s=600, clock=lambda: now[0])
    path = run.heartbeat_json(1, 0)
    path.parent.mkdir(parents=True)
    for text in ("", "{", '{"count": "x"}', "[]", '{"count": 1, "time": null}'):
        path.write_text(text)
        now[0] += 100
        assert watchdog.look() is None
