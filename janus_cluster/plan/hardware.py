"""What the GPUs and their links can do, and what of it is taken to be reached.

The GPUs are those of the gate (templates/gpu, each number with its source). `Assumptions` are not measured on an H800;
docs/performance.md has the source of each.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

from janus_cluster.job.gpu_part import GpuPart
from janus_cluster.job.home import site_dir
from janus_cluster.job.profiles import is_path, load_part, load_parts
from janus_cluster.job.ring import ring_bus_gb_per_s
from janus_cluster.job.schema import Hardware


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU. Units: GB of 1e9 bytes; bus_…: NCCL's bus bandwidth of an all-reduce on one node and on two."""

    name: str
    peak_tflops: float
    memory_gb: float
    hbm_gb_per_s: float
    bus_one_node_gb_per_s: float
    bus_two_nodes_gb_per_s: float

    def bus_gb_per_s(self, nodes: int, gpus_per_node: int) -> float:
        """NCCL's bus bandwidth of an all-reduce over all GPUs of so many nodes."""
        if nodes == 1:
            return self.bus_one_node_gb_per_s
        return ring_bus_gb_per_s(self.bus_two_nodes_gb_per_s, nodes=nodes, gpus_per_node=gpus_per_node)

    @classmethod
    def of(cls, part: GpuPart) -> Gpu:
        """The bus bandwidths are what the gate demands at least: a node below them does not train."""
        return cls(
            name=part.label,
            peak_tflops=part.peak_tflops,
            memory_gb=part.memory_gb,
            hbm_gb_per_s=part.hbm_gb_per_s,
            bus_one_node_gb_per_s=part.bus_gb_per_s.one_node.fail_below,
            bus_two_nodes_gb_per_s=part.bus_gb_per_s.two_nodes.fail_below,
        )


def known_gpus() -> dict[str, Gpu]:
    """Every kind of GPU by the name that hardware.gpu_type gives it: the shipped ones and the site's own."""
    return _known_gpus(site_dir())


@functools.cache
def _known_gpus(site: Path) -> dict[str, Gpu]:
    return {name: Gpu.of(part) for name, part in load_parts(site).items()}


def find_gpu(gpu_type: str) -> Gpu | None:
    """The GPU of hardware.gpu_type, a name or a path; None for a name without figures. Raises: UsageError."""
    return Gpu.of(load_part(gpu_type)) if is_path(gpu_type) else known_gpus().get(gpu_type.lower())


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Assumptions that no data sheet covers.

    efficiency: share of the peak over everything computed, recomputing included.
    hidden: share of a collective that can overlap with computing, at most as long as that computing takes.
    straggler: how much longer the slowest of all ranks takes than the mean, per doubling of the ranks.
    module_call_s: host time that ZeRO-3's hooks add to one call of a module.
    reserve_gb: left free for the CUDA context, NCCL, cuBLAS workspaces and fragmentation.
    """

    efficiency: float = 0.40
    hidden: float = 0.9
    straggler: float = 0.01
    module_call_s: float = 0.45e-3
    optimizer_bytes: float = 30.0
    host_optimizer_bytes: float = 80.0
    host_gb_per_s: float = 200.0
    pcie_gb_per_s: float = 25.0
    reserve_gb: float = 6.0


ASSUMED = Assumptions()


def known_gpu(hardware: Hardware, name: str | None = None) -> Gpu | None:
    """The job's GPU, or the one called `name`, with the memory that the job gives it; None where that is not known.

    A GPU of which only the memory is known is timed as an H800, and so is a rank on a CPU: from option to option that
    decides little.
    """
    own_gb = hardware.gpu_memory_gb
    is_cpu = hardware.device == "cpu" and name is None
    found = None if is_cpu else find_gpu(name or hardware.gpu_type)
    if own_gb is None:
        return found
    label = "CPU rank" if is_cpu else hardware.gpu_type or "GPU"
    return replace(found or replace(known_gpus()["h800"], name=label), memory_gb=own_gb)


def assumptions_for(hardware: Hardware) -> Assumptions:
    """ASSUMED; but a rank on a CPU, whose memory the job gives, has no CUDA context and no NCCL to keep room for."""
    has_context = hardware.device == "cuda" or hardware.gpu_memory_gb is None
    return ASSUMED if has_context else replace(ASSUMED, reserve_gb=0.0)
