"""Who is missing in which collective, judged from what the ranks wrote; and the card of a time-out with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from trace_files import entry, write_trace

from janus_cluster.diagnosis.evidence import Evidence, RankError
from janus_cluster.diagnosis.failure import classify
from janus_cluster.diagnosis.stall import Stall, describe_ranks, judge_stall, load_stalls
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.attempt import HeartbeatRecord
from janus_cluster.run.records.stall import Collective, GroupState, StallRecord

NODES = {0: "node-1", 1: "node-1", 2: "node-2", 3: "node-2"}


def record(rank: int, *groups: GroupState, doing: str = "step", **changes: object) -> StallRecord:
    values: dict[str, object] = {"rank": rank, "node": NODES[rank], "time": 1.0, "doing": doing, "step": 7}
    return StallRecord(**(values | {"groups": groups} | changes))  # type: ignore[arg-type]


def waits(
    number: int, name: str = "all_reduce", *, group: str = "0", size: int = 8, state: str = "scheduled"
) -> GroupState:
    collective = Collective(number=number, name=name, sizes=((size,),), dtypes=("Float",), state=state)
    return GroupState(name=group, ranks=(0, 1, 2, 3), last_number=number, waits_in=collective)


def passed(number: int, *, group: str = "0") -> GroupState:
    return GroupState(name=group, ranks=(0, 1, 2, 3), last_number=number)


def judge(*records: StallRecord) -> Stall | None:
    return judge_stall({r.rank: r for r in records}, world_size=4, nodes=NODES)


def test_a_rank_that_gave_no_answer_is_the_one_that_is_missing() -> None:
    stall = judge(record(0, waits(412)), record(1, waits(412)), record(2, waits(412)))
    assert stall is not None and (stall.missing, stall.waiting) == ((3,), (0, 1, 2))
    assert stall.message == (
        "rank 3 on node-2 did not join all_reduce #412 (Float [8]), in which ranks 0–2 wait; it gave no answer"
    )


def test_a_rank_that_answers_from_elsewhere_is_missing_with_its_frames() -> None:
    lost = record(1, passed(411), doing="data", frames=('File "data.py", line 3, in read',))
    stall = judge(record(0, waits(412)), lost, record(2, waits(412)), record(3, waits(412)))
    assert stall is not None and (stall.missing, stall.frames) == ((1,), lost.frames)
    assert stall.message.endswith("in which ranks 0, 2–3 wait; it is in data of step 7")


def test_ranks_that_wait_in_another_group_for_the_same_rank_are_not_to_blame() -> None:
    # Rank 2 waits for rank 3 in a group of their own, and so is missing in the world's.
    pair = GroupState(name="9", ranks=(2, 3), last_number=5, waits_in=Collective(number=5, name="barrier"))
    stall = judge(record(0, waits(412)), record(1, waits(412)), record(2, passed(411), pair))
    assert stall is not None and stall.missing == (3,)


def test_another_collective_at_the_same_place_is_a_mismatch() -> None:
    others = [record(rank, waits(9)) for rank in (0, 1, 3)]
    stall = judge(*others, record(2, waits(9, "broadcast")))
    assert stall is not None and stall.missing == (2,)
    assert stall.message == (
        "rank 2 on node-2 called broadcast #9 (Float [8]) where ranks 0–1, 3 called all_reduce #9 (Float [8])"
    )
    sizes = judge(*others, record(2, waits(9, size=16)))
    assert sizes is not None and sizes.missing == (2,)
    halves = judge(
        record(0, waits(9)), record(1, waits(9)), record(2, waits(9, "gather")), record(3, waits(9, "gather"))
    )
    assert halves is not None and halves.missing == () and "called" in halves.message


def test_where_all_have_called_it_the_collective_itself_does_not_finish() -> None:
    stall = judge(*(record(rank, waits(5)) for rank in NODES))
    assert stall == Stall(
        message="ranks 0–3 joined all_reduce #5 (Float [8]), and it does not finish", waiting=(0, 1, 2, 3)
    )


def test_a_gpu_that_has_not_begun_it_holds_up_the_ones_that_have() -> None:
    begun = [record(rank, waits(5, state="started")) for rank in (0, 1, 2)]
    stall = judge(*begun, record(3, waits(5)))
    assert stall is not None and stall.missing == (3,)
    assert "its GPU has not begun it; ranks 0–2 did" in stall.message


def test_ranks_that_wait_in_nothing_prove_nothing() -> None:
    assert judge() is None
    assert judge(record(0, passed(3)), record(1, passed(3))) is None


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [([3], "rank 3 on node-2"), ([2, 3], "ranks 2–3 on node-2"), ([0, 1, 3], "ranks 0–1, 3"), ([0, 2], "ranks 0, 2")],
)
def test_ranks_are_named_with_their_node(ranks: list[int], expected: str) -> None:
    assert describe_ranks(ranks, NODES) == expected


def beat(rank: int, count: int) -> HeartbeatRecord:
    return HeartbeatRecord(rank=rank, node=NODES[rank], doing="step", step=7, has_begun=True, count=count, time=1.0)


def test_what_a_rank_wrote_in_an_earlier_standstill_does_not_count(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for rank, count in ((0, 5), (1, 6)):
        for path in (run.stall_json(1, rank), run.heartbeat_json(1, rank)):
            path.parent.mkdir(parents=True, exist_ok=True)
        record(rank, waits(3), count=5).write(run.stall_json(1, rank))
        beat(rank, count).write(run.heartbeat_json(1, rank))
    assert list(load_stalls(run, attempt=1, world_size=2)) == [0]


def test_the_traces_that_nccl_wrote_at_its_time_out_name_the_rank_on_the_card(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for rank in (0, 1, 2):
        write_trace(run.stall_trace(1, rank), [entry(1), entry(2, state="started"), entry(3, state="scheduled")])
    write_trace(run.stall_trace(1, 3), [entry(1)])
    records = load_stalls(run, attempt=1, world_size=4)
    stall = judge_stall(records, world_size=4, nodes=NODES)
    noticed = RankError(node="node-1", rank=0, time=1.0, message="DistBackendError: collective operation timeout")
    evidence = Evidence(state="FAILED", exit_code=12, errors=(noticed,), ranks=tuple(NODES.items()), stall=stall)
    failure = classify(evidence)
    assert failure is not None
    assert (failure.kind, failure.rank, failure.node) == ("nccl_timeout", 3, "node-2")
    assert (failure.message or "").startswith("rank 3 on node-2 did not join all_reduce #2 (BFloat16 [8])")
