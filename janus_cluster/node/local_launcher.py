"""The same job on this machine without Slurm: N simulated nodes, one task process each, on the loopback interface."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence

from janus_cluster.node.steps import PhaseProcesses
from janus_cluster.run.records.submission import Cluster


class LocalLauncher:
    """Nodes are named local-01, local-02; the job id is this process's pid."""

    cluster: Cluster = "local"

    def __init__(self, num_nodes: int) -> None:
        self.nodes = tuple(f"local-{i:02d}" for i in range(1, num_nodes + 1))
        self.job_id: str | None = f"local-{os.getpid()}"

    def master_addr(self) -> str:
        return "127.0.0.1"

    def is_ended_by_slurm(self) -> bool:
        return False

    def requeue(self) -> str | None:
        """Nothing is done; the reason is returned."""
        return "there is no queue on this machine; `janus-cluster resume` continues the run"

    def requeue_without(self, exclude: Sequence[str]) -> str | None:
        """Nothing is done; the reason is returned."""
        return f"there is no queue on this machine that could leave out {', '.join(exclude)}"

    def start(self, task_argv: Sequence[str], *, end_together: bool) -> PhaseProcesses:
        processes = []
        for rank, node in enumerate(self.nodes):
            identity = {"JANUS_NODE": node, "JANUS_NODE_RANK": str(rank), "JANUS_NUM_NODES": str(len(self.nodes))}
            identity["JANUS_ATTEMPT_PID"] = str(os.getpid())
            processes.append(subprocess.Popen(list(task_argv), env=os.environ | identity, stdin=subprocess.DEVNULL))
        # node.task makes torchrun ignore SIGTERM: Slurm sends it to all processes of a job that may still save.
        return PhaseProcesses(processes, end_together=end_together, ending=signal.SIGINT)
