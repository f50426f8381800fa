"""Steps inside an allocation: srun starts one task per node."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from janus_cluster.errors import JanusError
from janus_cluster.node.steps import Step
from janus_cluster.slurm.commands import Slurm, parse_hostlist


@dataclass(frozen=True)
class SlurmLauncher:
    """One allocation, as the batch shell's environment describes it."""

    cluster: str
    job_id: str | None
    nodes: tuple[str, ...]
    partition: str | None = None

    @classmethod
    def of_allocation(cls, environ: Mapping[str, str], *, cluster: str, num_nodes: int) -> SlurmLauncher:
        """The allocation of this batch script. Raises: JanusError outside one, or when its size is another."""
        job_id, node_list = environ.get("SLURM_JOB_ID"), environ.get("SLURM_JOB_NODELIST")
        if not job_id or not node_list:
            raise JanusError(
                "this script is not running inside a Slurm allocation (SLURM_JOB_ID is not set)",
                hint="sbatch job.sbatch, or janus-cluster submit --cluster local",
            )
        nodes = parse_hostlist(node_list)
        if len(nodes) != num_nodes:
            raise JanusError(f"the job is for {num_nodes} nodes, the allocation has {len(nodes)}: {', '.join(nodes)}")
        return cls(cluster, job_id, nodes, environ.get("SLURM_JOB_PARTITION"))

    def master_addr(self) -> str:
        """Node 0 by name where the name resolves, else the address that Slurm has for it."""
        try:
            socket.getaddrinfo(self.nodes[0], None)
        except OSError:
            address = Slurm().node_address(self.nodes[0])
            if address is None:
                raise JanusError(f"{self.nodes[0]} does not resolve and Slurm knows no NodeAddr for it") from None
            return address
        return self.nodes[0]

    def requeue(self) -> str | None:
        """The job is back in the queue, and this process is about to be ended; or why it is not."""
        try:
            Slurm().requeue(str(self.job_id))
        except JanusError as e:
            return e.message
        return None

    def requeue_without(self, exclude: Sequence[str]) -> str | None:
        """The job is back in the queue without those nodes; or why it is not, where it could never start again."""
        slurm = Slurm()
        left = slurm.usable_nodes(self.partition) - set(exclude)
        if len(left) < len(self.nodes):
            return (
                f"partition {self.partition or '(any)'} has {len(left)} other nodes that are neither down nor drained, "
                f"{len(self.nodes)} are needed"
            )
        slurm.requeue_without(str(self.job_id), exclude)
        return None

    def start(self, task_argv: Sequence[str], *, end_together: bool) -> Step:
        num = len(self.nodes)
        srun = [
            "srun",
            f"--nodes={num}",
            f"--ntasks={num}",
            "--ntasks-per-node=1",
            # One task per node starts all ranks of the node: it must not be bound to one core.
            "--cpu-bind=none",
            f"--kill-on-bad-exit={int(end_together)}",
            "--wait=0",
            "--export=ALL",
        ]
        return Step([subprocess.Popen([*srun, *task_argv], stdin=subprocess.DEVNULL)], end_together=end_together)
