from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from janus_cluster.errors import JanusError
from janus_cluster.node.port import find_free_port
from janus_cluster.node.steps import PhaseProcesses
from janus_cluster.node.topology import NodeIdentity, read_identity
from janus_cluster.node.torchrun import build_torchrun_argv


def test_a_node_knows_itself_from_slurm_or_from_the_local_launcher() -> None:
    slurm = {"SLURMD_NODENAME": "h800-02", "SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "2"}
    assert read_identity(slurm) == NodeIdentity("h800-02", 1, 2)
    local = {"JANUS_NODE": "local-01", "JANUS_NODE_RANK": "0", "JANUS_NUM_NODES": "2"}
    assert read_identity(slurm | local) == NodeIdentity("local-01", 0, 2)
    with pytest.raises(JanusError, match="SLURMD_NODENAME"):
        read_identity({"SLURMD_NODENAME": "h800-02"})


def test_torchrun_pins_the_node_rank_and_never_restarts() -> None:
    argv = build_torchrun_argv(
        "/py",
        "m",
        ["/run", "--attempt", "1"],
        identity=NodeIdentity("n2", 1, 2),
        processes_per_node=8,
        master_addr="n1",
        master_port=15000,
        log_dir=Path("/run/logs"),
    )
    for word in ("--node-rank=1", "--nnodes=2", "--nproc-per-node=8", "--master-addr=n1", "--max-restarts=0"):
        assert word in argv
    assert argv[-6:] == ["-m", "--", "m", "/run", "--attempt", "1"]


def test_a_port_in_use_is_passed_over() -> None:
    port = find_free_port(seed=4)
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        other = find_free_port(seed=4)
    assert other != port


def start(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code])


def test_a_step_returns_the_worst_exit_code() -> None:
    step = PhaseProcesses([start("pass"), start("raise SystemExit(7)")], end_together=False)
    assert step.wait(timeout_s=30, on_wait=lambda step: None) == 7


def test_a_failed_node_ends_the_others_when_they_end_together() -> None:
    begun = time.monotonic()
    step = PhaseProcesses([start("import time; time.sleep(60)"), start("raise SystemExit(3)")], end_together=True)
    assert step.wait(timeout_s=60, on_wait=lambda step: None) == 3
    assert time.monotonic() - begun < 30


def test_a_step_past_its_limit_is_ended_and_reports_it() -> None:
    step = PhaseProcesses([start("import time; time.sleep(60)")], end_together=False)
    assert step.wait(timeout_s=0.5, on_wait=lambda step: None) == 124


def test_a_killed_process_has_the_exit_code_of_a_shell() -> None:
    step = PhaseProcesses([start("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")], end_together=False)
    assert step.wait(timeout_s=30, on_wait=lambda step: None) == 128 + 9
