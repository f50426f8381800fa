"""Training that is complete while its processes do not end, as under a slurmstepd that hangs."""

from __future__ import annotations

from pathlib import Path

from run_files import append_metric_line

from janus_cluster.node.completion import LEAVE_S, Completion
from janus_cluster.run.paths import RunDir


def test_processes_are_overdue_a_minute_after_the_attempts_own_last_record(tmp_path: Path) -> None:
    run, now_s = RunDir(tmp_path), 0.0
    completion = Completion(run, attempt=2, clock=lambda: now_s)
    append_metric_line(run, {"kind": "complete", "step": 8, "total_steps": 8, "attempt": 1, "time": 1.0})
    now_s = 2 * LEAVE_S
    assert not completion.is_overdue() and not completion.is_recorded, "that was the attempt before"
    append_metric_line(run, {"kind": "complete", "step": 8, "total_steps": 8, "attempt": 2, "time": 2.0})
    now_s += 5
    assert not completion.is_overdue() and completion.is_recorded
    now_s += LEAVE_S - 1
    assert not completion.is_overdue()
    now_s += 1
    assert completion.is_overdue()
