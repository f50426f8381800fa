"""Steps inside an allocation: srun starts one task per node."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from janus_cluster.errors import JanusError, SlurmUnavailable
from janus_cluster.node.steps import Step
from janus_cluster.slurm.commands import Slurm, parse_hostlist

# srun would take them for options of the step, which is to get all that the job has on each node; and a newer srun
# (told of 25.05) refuses to start where the two differ, as they do where a site's plugin changed one of them.
_NOT_FOR_STEPS = ("SLURM_CPUS_PER_TASK", "SLURM_TRES_PER_TASK")

_PATIENCE_S = 120.0
_PAUSE_S = 2.0


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
        """Node 0 by name, where that means what node 1 sees of it; else its address towards node 1, or Slurm's for it.

        Call it on node 0. There /etc/hosts often gives the host's own name to 127.0.1.1, or nss-myhostname to docker0:
        whatever NCCL and gloo bound to the interface of such an address, node 1 could not reach.
        """
        own = _name_that_resolves(self.nodes[0])
        if len(self.nodes) < 2:
            return own
        try:
            towards = _own_address_towards(_name_that_resolves(self.nodes[1]))
        except JanusError:
            return own  # a site that tells users nothing of nodes; the gate tries the connection
        return own if towards in (None, _address_of(own)) else towards

    def requeue(self) -> str | None:
        """The job is back in the queue, and this process is about to be ended; or why it is not.

        A controller that is being restarted is waited for: else the run would lie still from then on.
        """
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                Slurm().requeue(str(self.job_id))
                return None
            except SlurmUnavailable as e:
                if time.monotonic() > deadline or shutil.which("scontrol") is None:
                    return e.message
                time.sleep(_PAUSE_S)
            except JanusError as e:
                return e.message

    def requeue_without(self, exclude: Sequence[str]) -> str | None:
        """The job is back in the queue without those nodes; or why it is not, where it could never start again."""
        slurm = Slurm()
        usable = slurm.usable_nodes(self.partition)
        # A partition may hold nodes of other kinds, which could not run the job: as good are those like this one.
        own = usable.get(self.nodes[0])
        left = {node for node, gres in usable.items() if own in (None, gres)} - set(exclude)
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
            # All of the job's memory on each node, however the job asked for it. Without it srun takes SLURM_MEM_PER_…
            # for its own option, and will not start where two of them are set (seen with 22.05).
            "--mem=0",
            f"--kill-on-bad-exit={int(end_together)}",
            "--wait=0",
            "--export=ALL",
        ]
        environ = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_STEPS}
        try:
            process = subprocess.Popen([*srun, *task_argv], stdin=subprocess.DEVNULL, env=environ)
        except FileNotFoundError as e:
            raise SlurmUnavailable(
                f"no srun on PATH of {self.nodes[0]}: does environment.setup take Slurm away (module purge)?",
                hint="add a line to environment.setup that brings Slurm back, e.g. module load slurm",
            ) from e
        return Step([process], end_together=end_together)


def _name_that_resolves(node: str) -> str:
    """The node's name, or what Slurm has for its address where the name means nothing here.

    Raises: SlurmUnavailable, JanusError.
    """
    if _address_of(node) is not None:
        return node
    address = Slurm().node_address(node)
    if address is None:
        raise JanusError(f"{node} does not resolve and Slurm knows no NodeAddr for it")
    return address


def _address_of(name: str) -> str | None:
    """The IPv4 address that a connection by this name goes to first, another kind only where it has none; else None."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return None
    return str(next((info for info in found if info[0] == socket.AF_INET), found[0])[4][0])


def _own_address_towards(peer: str) -> str | None:
    """The address from which this host speaks to `peer`; None where no route leads there. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((peer, 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])
