"""This node's identity within the job: from Slurm's environment or the local launcher's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from janus_cluster.errors import JanusError


@dataclass(frozen=True)
class NodeIdentity:
    """`node_rank` 0 is the node where the batch script runs and where the rendezvous listens."""

    node: str
    node_rank: int
    num_nodes: int


def read_identity(environ: Mapping[str, str]) -> NodeIdentity:
    """This node's name and rank. Raises: JanusError when neither Slurm nor the local launcher set them."""
    for name, rank, count in (
        ("JANUS_NODE", "JANUS_NODE_RANK", "JANUS_NUM_NODES"),
        # Of the step: the job may have a node more than it uses.
        ("SLURMD_NODENAME", "SLURM_NODEID", "SLURM_STEP_NUM_NODES"),
    ):
        if name in environ and rank in environ and count in environ:
            return NodeIdentity(environ[name], int(environ[rank]), int(environ[count]))
    raise JanusError(
        "not inside a Slurm step: SLURMD_NODENAME, SLURM_NODEID and SLURM_STEP_NUM_NODES are not all set",
        hint="this program is started by job.sbatch; submit with: janus-cluster submit",
    )
