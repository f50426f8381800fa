"""Real failures of real ranks under real torchrun, two agents of two ranks each: the card names the one that began."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from janus_cluster.diagnosis.card import load_card, render_card
from janus_cluster.node.topology import NodeIdentity
from janus_cluster.node.torchrun import build_torchrun_argv
from janus_cluster.run.files import write_json_atomically
from janus_cluster.run.paths import RunDir
from janus_cluster.slurm.state import load_job_states

pytestmark = pytest.mark.train

NODES = ("h800-01", "h800-02")
JOB_ID = "local-999999999"


def fail_for_real(run: RunDir, kind: str, rank: int) -> None:
    """Both agents have ended, and the attempt has recorded it as node.attempt does."""
    attempt = run.begin_attempt()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environ = os.environ | {"FAILURE": kind, "FAILING_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    environ |= {"PYTHONPATH": str(Path(__file__).parent), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    agents = []
    for i, node in enumerate(NODES):
        argv = build_torchrun_argv(
            sys.executable,
            "failing_rank",
            [str(run.path), "--attempt", str(attempt), "--node", node],
            identity=NodeIdentity(node=node, node_rank=i, num_nodes=2),
            processes_per_node=2,
            master_addr="127.0.0.1",
            master_port=port,
            log_dir=run.torchrun_logs(attempt, node),
        )
        with run.node_log(attempt, node).open("ab") as log:
            agents.append(subprocess.Popen(argv, env=environ, stdout=log, stderr=subprocess.STDOUT))
    assert all(agent.wait(timeout=600) for agent in agents), "nothing failed"
    sent = {"cluster": "local", "job_id": JOB_ID, "submitted_at": time.time() - 60}
    write_json_atomically(run.submission_json, sent)
    word = {"cluster": "local", "job_id": JOB_ID, "attempt": attempt, "nodes": list(NODES), "state": "FAILED"}
    word |= {"exit_code": 12, "reason": "training ended with exit code 1", "updated_at": time.time()}
    write_json_atomically(run.status_json, word)


CLASSES = {"abort": "host_out_of_memory", "abort_at_start": "host_out_of_memory"}


@pytest.mark.parametrize(
    ("kind", "rank", "words"),
    [
        ("exception", 2, ["ValueError: a mask of the wrong shape", "failing_rank.py", "raise ValueError("]),
        ("signal", 3, ["SIGKILL ended the process of rank 3"]),
        ("host_out_of_memory", 1, ["can't allocate memory"]),
        ("abort", 2, ["std::bad_alloc"]),
        ("abort_at_start", 3, ["std::bad_alloc"]),
        ("disk_full", 2, ["No space left on device", "df -h"]),
        ("bad_data", 1, ["cannot be decoded", "sample:", "torn picture.png", "load_frame"]),
        ("nccl_timeout", 1, ["rank 1 did not take part", "Timed out waiting"]),
    ],
)
def test_the_card_names_the_first_rank_and_the_class(tmp_path: Path, kind: str, rank: int, words: list[str]) -> None:
    run = RunDir(tmp_path / "demo-1")
    run.path.mkdir()
    fail_for_real(run, kind, rank)
    card = load_card(run, load_job_states([run])[0])
    assert card is not None
    logs = "\n".join(p.read_text(errors="replace") for p in sorted(run.attempt_logs(1).glob("*.log")))
    first = (CLASSES.get(kind, kind), rank, NODES[rank // 2])
    assert (card.failure.kind, card.failure.rank, card.failure.node) == first, logs
    shown = "\n".join(render_card(card))
    for word in words:
        assert word in shown
    assert "Connection closed by peer" not in shown
    assert "none that is complete" in shown
    assert f"janus-cluster resume {run.path}" in shown
