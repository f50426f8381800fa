"""The flight recorder's trace as a file that others wrote: its groups, and nothing that is run."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from trace_files import entry, trace

from janus_cluster.run.records.stall import Collective, parse_groups, parse_trace


def test_a_group_waits_in_the_oldest_collective_that_has_not_finished() -> None:
    entries = [
        entry(1),
        entry(2, "_all_gather_base", state="started"),
        entry(3, state="scheduled"),
        entry(7, group="5"),
    ]
    world, other = parse_groups(parse_trace(pickle.dumps(trace(entries))))
    expected = Collective(number=2, name="_all_gather_base", sizes=((8,),), dtypes=("BFloat16",), state="started")
    assert (world.name, world.ranks, world.last_number, world.waits_in) == ("0", (0, 1, 2, 3), 3, expected)
    assert (other.name, other.last_number, other.waits_in) == ("5", 7, None)


def test_gloo_marks_what_has_finished_as_retired_and_leaves_its_state() -> None:
    done = entry(1) | {"state": "scheduled", "retired": True}
    assert parse_groups(trace([done]))[0].waits_in is None
    assert parse_groups(trace([done, entry(2, state="scheduled")]))[0].waits_in is not None


def test_sends_between_two_ranks_are_no_collectives() -> None:
    assert parse_groups(trace([entry(1, "send 0->1", state="scheduled") | {"is_p2p": True}])) == ()


def test_sizes_and_members_of_another_shape_are_left_out() -> None:
    odd = entry(1, state="scheduled") | {"input_sizes": [8, None], "input_dtypes": None}
    (group,) = parse_groups({"entries": [odd], "pg_config": {"0": {"ranks": "all"}}})
    assert (group.ranks, group.waits_in) == ((), Collective(number=1, name="all_reduce"))


class Runs:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("touched"),)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "data",
    [b"", b"torn", pickle.dumps(trace([entry(1)]))[:-20], pickle.dumps([1]), pickle.dumps({"entries": [1]})],
    ids=["empty", "no pickle", "torn", "no object", "no entries"],
)
def test_what_is_no_trace_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="no trace of a flight recorder"):
        parse_trace(data)


def test_a_trace_can_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no trace of a flight recorder"):
        parse_trace(pickle.dumps({"entries": [Runs()]}))
    assert not (tmp_path / "touched").exists()
