"""Steps inside an allocation: srun starts one task per node."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from janus_cluster.errors import JanusError, SlurmUnavailable
from janus_cluster.node.steps import LauncherMessages, PhaseProcesses
from janus_cluster.preflight.route import source_towards
from janus_cluster.run.hosts import fold_nodes
from janus_cluster.run.records.submission import Cluster
from janus_cluster.slurm.commands import Slurm, SlurmJob, parse_hostlist

# srun would take them for options of the step, which is to get all that the job has on each node. srun 25.05 refuses
# to start where the two differ, as they do where a site's plugin changed one of them.
_NOT_FOR_STEPS = ("SLURM_CPUS_PER_TASK", "SLURM_TRES_PER_TASK")

# For a requeue: how long where the job's end is not known, and how long before it to give up.
_PATIENCE_S = 120.0
_BEFORE_END_S = 60.0
# A job that was stopped long before its end must not hold its nodes for a refusal that is not known here.
_MOST_PATIENCE_S = 1800.0
_PAUSE_S = 2.0
# Refusals of `scontrol requeue` that another try cannot change. Source: slurm_errno.c of 22.05.
_PERMANENT = re.compile(
    r"invalid job id|access/permission denied|presently disabled|operation (?:is )?not supported|"
    r"already complet|already finished|invalid user",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class SlurmLauncher:
    """One allocation, as the batch shell's environment describes it."""

    cluster: Cluster
    job_id: str | None
    nodes: tuple[str, ...]
    partition: str | None = None
    # On so few nodes the job may run, too; None: on no fewer than it has.
    fewest: int | None = None
    # The job's own options of srun, as written.
    srun_extra: tuple[str, ...] = ()

    @classmethod
    def of_allocation(
        cls, environ: Mapping[str, str], *, cluster: Cluster, numbers: Collection[int], srun_extra: Sequence[str] = ()
    ) -> SlurmLauncher:
        """The allocation of this batch script; of its nodes as many as one of the `numbers` that the job can run on.

        Raises: JanusError outside an allocation, or when its size differs.
        """
        job_id, node_list = environ.get("SLURM_JOB_ID"), environ.get("SLURM_JOB_NODELIST")
        if not job_id or not node_list:
            raise JanusError(
                "this script is not running inside a Slurm allocation (SLURM_JOB_ID is not set)",
                hint="sbatch job.sbatch, or janus-cluster submit --cluster local",
            )
        nodes = parse_hostlist(node_list)
        usable = max((number for number in numbers if number <= len(nodes)), default=0)
        if not usable or len(nodes) > max(numbers):
            wanted = " or ".join(map(str, sorted(numbers)))
            raise JanusError(f"the job is for {wanted} nodes, the allocation has {len(nodes)}: {fold_nodes(nodes)}")
        partition = environ.get("SLURM_JOB_PARTITION")
        return cls(cluster, job_id, nodes[:usable], partition, min(numbers), tuple(srun_extra))

    def master_addr(self) -> str:
        """Node 0's name, if node 1 resolves it to a reachable address; else its address towards node 1, or Slurm's.

        Call it on node 0. There /etc/hosts often maps the host's own name to 127.0.1.1, or nss-myhostname to docker0:
        node 1 could not reach what NCCL and gloo bind to the interface of such an address.
        """
        own = _name_that_resolves(self.nodes[0])
        if len(self.nodes) < 2:
            return own
        try:
            towards = source_towards(_name_that_resolves(self.nodes[1]))
        except (JanusError, OSError):
            return own  # a site that shows users no nodes, or no route; the gate tries the connection
        return own if towards == _address_of(own) else towards

    def is_ended_by_slurm(self) -> bool:
        """Whether Slurm ends the job for good: it was cancelled, or another job took its nodes.

        `scontrol requeue` would take such a job back into the queue for as long as its processes end. One whose time is
        up may be requeued. False where the controller gives no answer.
        """
        job = self._ask_job(Slurm())
        if job is None or _is_requeued(job):
            return False
        return job.state in ("COMPLETING", "CANCELLED", "PREEMPTED", "DEADLINE") and job.reason != "TimeLimit"

    def requeue(self) -> str | None:
        """Requeue the job, after which Slurm ends this process; or return why it was not.

        Whatever a controller answers that is no known refusal is tried again until shortly before the job's end,
        for half an hour at most:
        otherwise the run would end here. A request whose answer was lost is not repeated once Slurm has requeued.
        """
        slurm, now = Slurm(), time.time()
        give_up_at = min(_end_of_job(os.environ) or now + _PATIENCE_S, now + _MOST_PATIENCE_S)
        while True:
            try:
                slurm.requeue(str(self.job_id))
                return None
            except JanusError as e:
                if _PERMANENT.search(e.message) or time.time() > give_up_at or shutil.which("scontrol") is None:
                    return e.message
            if (job := self._ask_job(slurm)) is not None and _is_requeued(job):
                return None
            time.sleep(_PAUSE_S)

    def _ask_job(self, slurm: Slurm) -> SlurmJob | None:
        """The job as the controller holds it; None where it gives no answer."""
        try:
            return slurm.squeue([str(self.job_id)]).get(str(self.job_id))
        except JanusError:
            return None

    def requeue_without(self, exclude: Sequence[str]) -> str | None:
        """Requeue the job without those nodes; or return why not, where too few other nodes are left."""
        slurm = Slurm()
        usable = slurm.usable_nodes(self.partition)
        # A partition may hold nodes of other kinds, which could not run the job: only nodes like this one count.
        own = usable.get(self.nodes[0])
        left = {node for node, gres in usable.items() if own in (None, gres)} - set(exclude)
        needed = self.fewest or len(self.nodes)
        if len(left) < needed:
            return (
                f"partition {self.partition or '(any)'} has {len(left)} other nodes that are neither down nor drained, "
                f"{needed} are needed"
            )
        slurm.requeue_without(str(self.job_id), exclude)
        return None

    def start(self, task_argv: Sequence[str], *, end_together: bool) -> PhaseProcesses:
        num = len(self.nodes)
        srun = [
            "srun",
            f"--nodes={num}",
            f"--ntasks={num}",
            "--ntasks-per-node=1",
            # The allocation may have a node more than the job can use.
            f"--nodelist={','.join(self.nodes)}",
            # One task per node starts all ranks of the node: it must not be bound to one core.
            "--cpu-bind=none",
            # torchrun needs no MPI; a site's MpiDefault (pmix) may not fit its own srun.
            "--mpi=none",
            # All of the job's memory on each node, however the job asked for it. Without it srun takes SLURM_MEM_PER_…
            # for its own option, and will not start where two of them are set (seen with 22.05).
            "--mem=0",
            f"--kill-on-bad-exit={int(end_together)}",
            "--wait=0",
            "--export=ALL",
            *self.srun_extra,
        ]
        environ = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_STEPS}
        try:
            process = subprocess.Popen(
                [*srun, *task_argv], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environ
            )
        except FileNotFoundError as e:
            raise SlurmUnavailable(
                f"no srun on PATH of {self.nodes[0]}: does environment.setup remove Slurm (module purge)?",
                hint="add a line to environment.setup that restores Slurm, e.g. module load slurm",
            ) from e
        return PhaseProcesses([process], end_together=end_together, messages=LauncherMessages(process.stderr))


def _is_requeued(job: SlurmJob) -> bool:
    """Whether the controller counts one start more than this batch script's."""
    own = os.environ.get("SLURM_RESTART_COUNT", "0")
    return job.restarts is not None and own.isdecimal() and job.restarts > int(own)


def _end_of_job(environ: Mapping[str, str]) -> float | None:
    """When to give up, in epoch seconds, from Slurm's SLURM_JOB_END_TIME (22.05 and newer); None without it."""
    end = environ.get("SLURM_JOB_END_TIME", "")
    return float(end) - _BEFORE_END_S if end.isdecimal() else None


def _name_that_resolves(node: str) -> str:
    """The node's name, or Slurm's NodeAddr where the name does not resolve here.

    Raises: SlurmUnavailable, JanusError.
    """
    if _address_of(node) is not None:
        return node
    address = Slurm().node_address(node)
    if address is None:
        raise JanusError(f"{node} does not resolve and Slurm knows no NodeAddr for it")
    return address


def _address_of(name: str) -> str | None:
    """The IPv4 address that a connection by this name uses, another kind only where it has none; else None."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return None
    return str(next((info for info in found if info[0] == socket.AF_INET), found[0])[4][0])
