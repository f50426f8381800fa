"""A node whose probe did not report shows the exception of its ranks, and NCCL's own warnings."""

from __future__ import annotations

import json
from pathlib import Path

from janus_cluster.node.probe_errors import load_probe_error
from janus_cluster.preflight.all_reduce import judge_all_reduce
from janus_cluster.preflight.rate import Limit
from janus_cluster.run.paths import RunDir

NODE = "h800-01"
NO_PLUGIN = "DistBackendError: NCCL error in: N.cpp:1, invalid usage\nLast error:\nFailed to initialize any NET plugin"


def write_error(run: RunDir, local_rank: int, message: str, *, at: float) -> None:
    """The error file that torchrun leaves of a rank."""
    folder = run.torchrun_logs(1, NODE) / "x" / "attempt_0" / str(local_rank)
    folder.mkdir(parents=True)
    info = {"py_callstack": "Traceback", "timestamp": str(int(at))}
    (folder / "error.json").write_text(json.dumps({"message": {"message": message, "extraInfo": info}}))


def measured(run: RunDir) -> tuple[str, str]:
    error = load_probe_error(run, attempt=1, node=NODE)
    result = judge_all_reduce(None, node=NODE, world_size=16, floor=Limit(1.0, "FAIL", "test"), error=error)
    assert result.state == "FAIL"
    return result.measured, result.fix


def test_the_first_exception_that_is_no_echo_of_another_is_shown_with_its_advice(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_error(run, 0, "DistNetworkError: Connection reset by peer", at=100)
    write_error(run, 1, NO_PLUGIN, at=101)
    found, fix = measured(run)
    assert found.startswith("did not report: DistBackendError: NCCL error in")
    assert "Failed to initialize any NET plugin" in found
    assert "ibv_devinfo   # on h800-01: " in fix


def test_nccls_warnings_are_shown_once_each(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.preflight(1).mkdir(parents=True)
    for pid in (7, 8):
        lines = ["h:7:7 [0] NCCL INFO fine", "h:7:7 [0] init.cc:3 NCCL WARN Bootstrap : no socket interface found"]
        (run.preflight(1) / f"nccl.{NODE}.{pid}.log").write_text("\n".join(lines))
    found, fix = measured(run)
    assert found == "did not report: NCCL: Bootstrap : no socket interface found"
    assert fix.startswith("ip -br link   # on h800-01: ")


def test_the_nodes_log_serves_where_no_rank_left_a_file(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.node_log(1, NODE).parent.mkdir(parents=True)
    run.node_log(1, NODE).write_text(
        'Traceback (most recent call last):\n  File "x.py", line 1\nImportError: no libcudart\n'
    )
    assert measured(run)[0] == "did not report: ImportError: no libcudart"


def test_a_silent_node_only_did_not_report(tmp_path: Path) -> None:
    found, fix = measured(RunDir(tmp_path))
    assert found == "did not report"
    assert "node logs" in fix
