"""metrics.jsonl while the disk is full: no end of training, and nothing missing afterwards."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from run_files import read_metric_lines

from janus_cluster.diagnosis.failure import kind_of_message
from janus_cluster.run.files import name_of_trouble
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.metrics import CheckpointEvent, StopEvent, TrainEvent
from janus_cluster.training.metrics import MetricsLog

pytestmark = pytest.mark.train


def test_what_cannot_be_written_now_is_written_with_the_next_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path / "run")
    metrics = MetricsLog(run, attempt=1, is_main=True, effective_batch_size=4)
    metrics.append(TrainEvent(step=1))
    metrics.append(CheckpointEvent(step=1))
    assert "metrics.jsonl: ENOENT; it is tried again" in capsys.readouterr().out
    # A card must not take what was lived through for the cause of a later end.
    assert kind_of_message(f"warning: metrics.jsonl: {name_of_trouble(OSError(errno.ENOSPC, 'No space'))}") is None
    run.path.mkdir()
    metrics.append(TrainEvent(step=2))
    metrics.append(TrainEvent(step=3))
    reported = [(line["kind"], line["step"]) for line in read_metric_lines(run)]
    assert reported == [("train", 1), ("checkpoint", 1), ("train", 2), ("train", 3)]


def test_a_stop_that_cannot_be_recorded_is_not_taken_for_the_end_of_training(tmp_path: Path) -> None:
    metrics = MetricsLog(RunDir(tmp_path / "run"), attempt=1, is_main=True, effective_batch_size=4)
    with pytest.raises(OSError, match="No such file"):
        metrics.append(StopEvent(step=3))
