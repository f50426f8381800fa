"""What the GPUs and their links can do, and what of it is taken to be reached: each number with its source.

Data sheets give peaks. `Assumptions` are not measured on an H800; docs/performance.md says where each comes from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from janus_cluster.config.schema import Hardware


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU and its links.

    Units: memory in GB (1e9 bytes); bus_gb_per_s is NCCL's bus bandwidth of an all-reduce, by number of nodes;
    nvlink and rail are data-sheet rates in one direction, for one GPU.
    """

    name: str
    peak_tflops: float
    memory_gb: float
    hbm_gb_per_s: float
    nvlink_gb_per_s: float
    rail_gb_per_s: float
    bus_gb_per_s: dict[int, float]


GPUS = {
    "h800": Gpu(
        name="H800",
        peak_tflops=989.0,  # dense bf16, data sheet of the H100 SXM, whose compute units it has
        memory_gb=80.0,  # nominal; nvidia-smi reports 81,559 MiB, 85.5 GB
        hbm_gb_per_s=3350.0,
        nvlink_gb_per_s=200.0,  # 400 GB/s both ways
        rail_gb_per_s=50.0,  # 400 Gb/s
        # What the gate demands at least (templates/preflight/h800-ib.yaml): a node below it does not train.
        bus_gb_per_s={1: 135.0, 2: 130.0},
    ),
    "h200": Gpu(
        name="H200",
        peak_tflops=989.0,
        memory_gb=141.0,
        hbm_gb_per_s=4800.0,
        nvlink_gb_per_s=450.0,
        rail_gb_per_s=50.0,
        # The H800's share of NVLink on one node; on two, the same share of the eight rails, which are slower.
        bus_gb_per_s={1: 304.0, 2: 260.0},
    ),
}


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What no data sheet says.

    efficiency: share of the peak over everything computed, recomputing included.
    hidden: share of a collective that can run behind computing, at most as long as that computing lasts.
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
    wanted, own_gb = name or hardware.gpu_type.lower(), hardware.gpu_memory_gb
    is_cpu = hardware.device == "cpu" and name is None
    if own_gb is None:
        return None if is_cpu else GPUS.get(wanted)
    label = "CPU rank" if is_cpu else hardware.gpu_type or "GPU"
    base = GPUS["h800"] if is_cpu else GPUS.get(wanted, replace(GPUS["h800"], name=label))
    return replace(base, name=label if is_cpu else base.name, memory_gb=own_gb)


def assumptions_for(hardware: Hardware) -> Assumptions:
    """ASSUMED; but a rank on a CPU, whose memory the job gives, has no CUDA context and no NCCL to keep room for."""
    has_context = hardware.device == "cuda" or hardware.gpu_memory_gb is None
    return ASSUMED if has_context else replace(ASSUMED, reserve_gb=0.0)
