"""Bus bandwidth of a ring all-reduce on any number of nodes, from what it is on two.

The gate's floors and the plan follow it. On one node there is no network in the ring: that is a number of its own.
"""

from __future__ import annotations

# Latency of one step in µs, ring algorithm, Simple protocol, and the factor that NCCL puts on it for large messages.
# Source: NVIDIA/nccl src/graph/tuning.cc: hwLat[NVLINK] and hwLat[NET]; "Plateau effect of ring".
STEP_WITHIN_NODE_US = 3.4
STEP_BETWEEN_NODES_US = 14.0
PLATEAU = 1.9
# The gate's message on GPUs.
PAYLOAD_BYTES = 1 << 30


def ring_latency_s(nodes: int, gpus_per_node: int) -> float:
    """Seconds that the steps of one all-reduce take beside its bytes.

    Of 2(n-1) steps over n GPUs, 2(nodes-1) are between nodes.
    Source: NVIDIA/nccl src/graph/tuning.cc, ncclTopoTuneModel.
    """
    steps, between = 2 * (nodes * gpus_per_node - 1), 2 * (nodes - 1)
    return PLATEAU * ((steps - between) * STEP_WITHIN_NODE_US + between * STEP_BETWEEN_NODES_US) / 1e6


def ring_bus_gb_per_s(
    on_two_nodes: float, *, nodes: int, gpus_per_node: int, payload_bytes: int = PAYLOAD_BYTES
) -> float:
    """GB/s on two or more nodes: what it is on two, less the latency of the steps that more nodes add.

    The part that is bytes over the slowest link does not depend on the number of ranks: that is what bus bandwidth
    means (NVIDIA/nccl-tests doc/PERFORMANCE.md).
    Raises: ValueError for one node.
    """
    if nodes < 2:
        raise ValueError("a ring on one node has no network in it")

    def latency_per_gb_s(number: int) -> float:
        ranks = number * gpus_per_node
        return ring_latency_s(number, gpus_per_node) * ranks / (2 * (ranks - 1)) / (payload_bytes / 1e9)

    return 1 / (1 / on_two_nodes + latency_per_gb_s(nodes) - latency_per_gb_s(2))
