"""One kind of GPU: what it can do, read by the gate and by plan from the same file (templates/gpu)."""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationError

from janus_cluster.errors import UsageError
from janus_cluster.job.schema import Section


class Floor(Section):
    """A rate below which the gate warns or fails, and where the number is from."""

    warn_below: float | None = Field(None, gt=0)
    fail_below: float = Field(gt=0)
    source: str

    def as_row(self) -> dict[str, Any]:
        """As a profile of the gate writes it."""
        return self.model_dump(exclude_none=True)


class BusFloors(Section):
    """NCCL's bus bandwidth of a ring over the GPUs of one node, and of two with a rail of 400 Gb/s for each GPU."""

    one_node: Floor
    two_nodes: Floor


class GpuPart(Section):
    """Units: GB of 1e9 bytes, MiB as nvidia-smi prints them; nvlink_gb_per_s is of both ways together."""

    label: str
    name: str
    peak_tflops: float = Field(gt=0)
    memory_gb: float = Field(gt=0)
    memory_mib_min: float = Field(gt=0)
    hbm_gb_per_s: float = Field(gt=0)
    nvlink_links: int = Field(ge=0)
    nvlink_gb_per_s: float = Field(ge=0)
    nvlink_source: str
    pcie_generation: int = Field(ge=1)
    pcie_width: int = Field(ge=1)
    power_limit_w: float = Field(gt=0)
    gemm_tflops: Floor
    bus_gb_per_s: BusFloors
    # The file, as messages name it.
    source: str

    def gate_rows(self) -> dict[str, dict[str, Any]]:
        """Section of a gate's profile → its values that follow from the GPU."""
        bus = self.bus_gb_per_s
        return {
            "gpu": {
                "name": self.name,
                "memory_mib_min": self.memory_mib_min,
                "pcie_width_min": self.pcie_width,
                "pcie_generation": self.pcie_generation,
                "power_limit_w_min": self.power_limit_w,
                "nvlink_links": self.nvlink_links,
                "nvlink_source": self.nvlink_source,
                "source": self.source,
            },
            "gemm": {"tflops": self.gemm_tflops.as_row()},
            "intra_node": {"busbw_gb_per_s": bus.one_node.as_row()},
            "all_reduce": {"busbw_gb_per_s": {"one_node": bus.one_node.as_row(), "two_nodes": bus.two_nodes.as_row()}},
        }


def parse_part(content: Any, *, label: str) -> GpuPart:
    """The part of a file's content. Raises: UsageError naming file, key and what is allowed."""
    if not isinstance(content, dict):
        raise UsageError(f"{label}: the figures of a GPU are a mapping", hint="copy templates/gpu/h800.yaml")
    try:
        return GpuPart.model_validate({**content, "source": label})
    except ValidationError as e:
        problems = [f"{label}: {'.'.join(map(str, x['loc']))}: {x['msg']}" for x in e.errors(include_url=False)]
        raise UsageError.of_many(problems, hint="templates/gpu/h800.yaml has every key") from None
