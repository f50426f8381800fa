"""The torchrun command line of one node: static rendezvous, node rank pinned from outside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from janus_cluster.node.topology import NodeIdentity


def build_torchrun_argv(
    python: str,
    module: str,
    module_args: Sequence[str],
    *,
    identity: NodeIdentity,
    processes_per_node: int,
    master_addr: str,
    master_port: int,
    log_dir: Path,
) -> list[str]:
    """argv of one torchrun agent that runs `module` in every process of this node.

    A static rendezvous, not c10d: with c10d rank 0 may run on another node than master_addr. No elastic restarts: an
    attempt that failed is judged and requeued as a whole.
    """
    return [
        python,
        "-m",
        "torch.distributed.run",
        f"--nnodes={identity.num_nodes}",
        f"--nproc-per-node={processes_per_node}",
        f"--node-rank={identity.node_rank}",
        "--rdzv-backend=static",
        f"--master-addr={master_addr}",
        f"--master-port={master_port}",
        "--max-restarts=0",
        f"--log-dir={log_dir}",
        "-m",
        # Without it torchrun takes an option of the module for an abbreviation of one of its own.
        "--",
        module,
        *module_args,
    ]


def describe_killed_torchrun(name: str) -> str:
    """The line of the node's log by which the diagnosis recognises it; torchrun itself could write none."""
    return f"torchrun of this node was ended by {name}"
