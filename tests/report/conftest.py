"""A run folder with two attempts, as training and the attempts write it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_files import append_metric_line, write_verdict

from janus_cluster.run.files import write_json_atomically
from janus_cluster.run.paths import RunDir

MakeRun = Callable[..., RunDir]
SEGMENTS = ("subinstruction", "description_2d", "description_3d", "action")


def train_record(step: int, *, attempt: int, **values: Any) -> dict[str, Any]:
    return {
        "kind": "train", "time": 1000.0 + 60 * attempt + step, "attempt": attempt, "step": step, "total_steps": 6,
        "loss": 10.0 - step, "loss_text": 6.0, "loss_action": 1.0, "loss_segments": dict.fromkeys(SEGMENTS, 5.0),
        "learning_rate": 1e-3, "grad_norm": 1.0, "step_time_s": (9.0, 2.0, 3.0)[(step - 1) % 3], "samples_per_s": 4.0,
        "ranks": {"gpu_memory_peak_gb": [0.0, 0.0], "data_wait_s": [0.1, 0.2], "visual_tokens": [100, 300]},
    } | values  # fmt: skip


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A function that makes a run folder: stopped after step 3, resumed, evaluated and done at step 6."""

    def make(name: str = "demo-20261121-aaaa", **settings: Any) -> RunDir:
        run = RunDir(tmp_path / "runs" / name)
        run.bundle(1).path.mkdir(parents=True)
        job = {"name": "demo", "nodes": 2, "training": {"seed": 0, "max_steps": 6}, "environment": {"variables": {}}}
        origins = {"name": "job.yaml:1", "nodes": "--nodes", "training.max_steps": "--set", "training.seed": "default"}
        job["training"] |= settings
        write_json_atomically(run.bundle(1).resolved_json, {"job": job, "origins": origins})
        write_json_atomically(run.status_json, {"state": "COMPLETED"})
        for attempt, (begin, state) in enumerate(((1000.0, "STOPPED"), (1100.0, "COMPLETED")), 1):
            run.attempt_logs(attempt).mkdir(parents=True)
            run.preflight(attempt).mkdir(parents=True)
            value = {
                "attempt": attempt, "nodes": ["n1", "n2"], "from_step": 3 * attempt - 3, "started_at": begin,
                "ended_at": begin + 90, "state": state, "exit_code": 0, "reason": None,
            }  # fmt: skip
            write_json_atomically(run.attempt_json(attempt), value)
            write_verdict(run, attempt, state="PASS", created_at=begin + 5)
        for step in (1, 2, 3):
            append_metric_line(run, train_record(step, attempt=1))
        append_metric_line(
            run, {"kind": "checkpoint", "time": 1064.0, "attempt": 1, "step": 3, "path": "/c/checkpoint-3"}
        )
        append_metric_line(
            run, {"kind": "stop", "time": 1065.0, "attempt": 1, "step": 3, "checkpoint": "/c/checkpoint-3"}
        )
        for step in (4, 5, 6):
            append_metric_line(run, train_record(step, attempt=2))
        append_metric_line(
            run,
            {"kind": "eval", "time": 1130.0, "attempt": 2, "step": 6, "action_accuracy": 0.6, "majority_accuracy": 0.4},
        )
        return run

    return make
