"""A run folder as `submit` resolves it, and the simulated nodes that run a training module in it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from janus_cluster.job.load import LoadedJob
from janus_cluster.job.resolve import resolve_job
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.job.schema import JobConfig
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.bundle import load_resolved

NODES = ("node-a", "node-b", "node-c", "node-d")
CPU = {"hardware": {"gpus_per_node": 0, "device": "cpu", "processes_per_node": 1}, "environment": {"profile": "cpu"}}


def resolve(job: dict[str, Any], *, run_dir: Path) -> ResolvedJob:
    """`job` as the login node resolves it, on two nodes of one process by default."""
    config = JobConfig.model_validate({"name": "test", "nodes": 2} | CPU | job)
    loaded = LoadedJob(config=config, origins={}, source="test", path=run_dir / "job.yaml")
    return resolve_job(loaded, run_dir=run_dir, cluster="local", environ={}, cwd=run_dir.parent, python=sys.executable)


def write_run_folder(path: Path, job: dict[str, Any]) -> RunDir:
    """`path` holds what the training modules read, and attempt 1 has begun."""
    resolved = resolve(job, run_dir=path)
    run = RunDir(path)
    bundle = run.bundle(1)
    bundle.path.mkdir(parents=True, exist_ok=True)
    bundle.resolved_json.write_text(resolved.model_dump_json(), encoding="utf-8")
    bundle.ds_config_json.write_text(json.dumps(resolved.ds_config), encoding="utf-8")
    if not run.attempts():
        run.begin_attempt()
    return run


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run_on_nodes(module: str, run: RunDir, *arguments: str, attempt: int = 1, timeout_s: float = 150) -> list[int]:
    """Exit codes of the torchrun agents that ran `module`, one for each of the job's nodes; see the node logs."""
    port = free_port()
    resolved = load_resolved(run.bundle(1))
    env = os.environ | {variable.name: variable.value for variable in resolved.env} | {"GLOO_SOCKET_IFNAME": "lo"}
    agents = []
    for node_rank, node in enumerate(NODES[: resolved.job.nodes]):
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", str(resolved.job.nodes),
            "--nproc-per-node", str(resolved.processes_per_node), "--node-rank", str(node_rank),
            "--master-addr", "127.0.0.1", "--master-port", str(port),
            # Without `--`, torchrun takes --node for a short form of its own --node-rank.
            "-m", "--", module, str(run.path), "--bundle", "1", "--attempt", str(attempt), "--node", node, *arguments,
        ]  # fmt: skip
        with run.node_log(attempt, node).open("a", encoding="utf-8") as log:
            agents.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    try:
        return [agent.wait(timeout=timeout_s) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()


def all_output(run: RunDir, *, attempt: int = 1) -> str:
    """All logs of an attempt, for the message of a failed test."""
    return "".join(f"--- {p.name}\n{p.read_text()}" for p in sorted(run.attempt_logs(attempt).glob("*.log")))
