"""A rank's own record of the exception that ends it. None of this needs torch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from janus_cluster.errors import TrainingFailed, UsageError
from janus_cluster.run.records.failure import FailureRecord, RankFailure
from janus_cluster.training.failure import failure_recorded


def record_of(path: Path, error: Exception) -> RankFailure:
    with pytest.raises(type(error)) as raised, failure_recorded(path, rank=3, node="h800-02"):
        raise error
    assert raised.value is error, "it is raised as it was"
    return RankFailure.require(path)


def test_our_own_error_is_recorded_with_its_class_and_hint(tmp_path: Path) -> None:
    path = tmp_path / "failures" / "rank3.json"
    found = record_of(path, TrainingFailed("the loss is not finite", hint="a smaller rate", kind="diverged"))
    assert (found.rank, found.node, found.type) == (3, "h800-02", "TrainingFailed")
    assert (found.message, found.hint, found.kind) == ("the loss is not finite", "a smaller rate", "diverged")
    assert not found.is_follow_up
    assert "raise error" in found.traceback


def test_a_rank_that_only_reports_another_ones_failure_is_marked_as_such(tmp_path: Path) -> None:
    assert record_of(tmp_path / "rank3.json", TrainingFailed("not finite elsewhere", is_follow_up=True)).is_follow_up


@pytest.mark.parametrize("error", [ValueError("a mask of the wrong shape"), UsageError("no such root", hint="name it")])
def test_an_error_without_a_class_is_left_to_the_node(tmp_path: Path, error: Exception) -> None:
    found = record_of(tmp_path / "rank3.json", error)
    assert (found.type, found.message, found.kind) == (type(error).__name__, str(error), None)


def test_a_record_that_cannot_be_written_does_not_take_the_place_of_the_error(tmp_path: Path) -> None:
    (tmp_path / "failures").write_text("a file where the folder should be")
    with (
        pytest.raises(ValueError, match="the real one"),
        failure_recorded(tmp_path / "failures" / "rank0.json", rank=0, node="a"),
    ):
        raise ValueError("the real one")


def test_of_an_endless_message_a_record_and_its_line_keep_the_beginning(tmp_path: Path) -> None:
    found = record_of(tmp_path / "rank3.json", ValueError("why: " + "x" * 1_000_000))
    assert found.message.startswith("why: ") and (tmp_path / "rank3.json").stat().st_size < 100_000
    line = FailureRecord(kind="exception", rank=3, node="h800-02", message=found.message).describe()
    assert line.startswith("a rank raised an error: rank 3 on h800-02: why: ") and len(line) < 400


def test_a_rank_that_ends_well_leaves_no_record(tmp_path: Path) -> None:
    path = tmp_path / f"rank{os.getpid()}.json"
    with failure_recorded(path, rank=0, node="a"):
        pass
    assert not path.exists()
