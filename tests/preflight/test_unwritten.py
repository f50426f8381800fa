"""A node that cannot write into the run folder reports it on its output, and the gate reads it there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from node_fixtures import FakeNode

from janus_cluster.preflight.unwritten import judge_unwritten, read_unwritten
from janus_cluster.run.files import write_text_atomically
from janus_cluster.run.paths import RunDir


def line(**changes: object) -> str:
    report = {"node": "h800-02", "attempt": 2, "path": "/runs/x", "error": "Read-only file system"} | changes
    return f"preflight: cannot write into the run folder: {json.dumps(report)}"


def test_a_task_that_cannot_write_its_log_names_node_folder_and_reason(tmp_path: Path) -> None:
    node = FakeNode(tmp_path)
    run = RunDir(Path(node.resolve().run_dir))
    run.bundle(1).path.mkdir(parents=True, exist_ok=True)
    write_text_atomically(run.bundle(1).resolved_json, node.resolve().model_dump_json())
    run.logs.write_text("a file where a folder should be")
    argv = [sys.executable, "-m", "janus_cluster.node.task", str(run.path), "--bundle", "1"]
    argv += ["--attempt", "1", "--phase", "facts"]
    identity = {"JANUS_NODE": "h800-02", "JANUS_NODE_RANK": "0", "JANUS_NUM_NODES": "1"}
    done = subprocess.run(argv, env=node.environ() | identity, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode != 0
    log = tmp_path / "batch.log"
    log.write_text(done.stdout)
    (result,) = judge_unwritten(read_unwritten(log, attempt=1), silent=["h800-02"])
    assert (result.id, result.state, result.node) == ("paths.output", "FAIL", "h800-02")
    assert result.measured == f"{run.path}: Not a directory"
    assert f"touch {run.path}" in result.fix


def test_lines_of_this_attempt_are_read_and_torn_ones_are_not(tmp_path: Path) -> None:
    log = tmp_path / "batch.log"
    assert read_unwritten(log, attempt=2) == {}
    log.write_text(
        "\n".join(
            [
                "attempt 2 of x",
                line(node="h800-01", attempt=1),
                f"1: {line()}",  # srun --label
                line(node="h800-03")[:-9],
                "preflight: cannot write into the run folder: 7",
            ]
        )
    )
    found = read_unwritten(log, attempt=2)
    assert list(found) == ["h800-02"]
    assert judge_unwritten(found, silent=["h800-01"]) == []
    assert [r.measured for r in judge_unwritten(found, silent=["h800-01", "h800-02"])] == [
        "/runs/x: Read-only file system"
    ]
