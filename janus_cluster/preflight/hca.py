"""InfiniBand ports as the kernel tells them in sysfs, and which of them are the rails of the GPUs.

A port is a rail when its link layer is InfiniBand and its adapter is of the kind that most InfiniBand ports are:
storage adapters are another kind. RoCE, bond and down Ethernet ports are no rails; nor is the free second port of an
adapter whose first one is up. NCCL_IB_HCA as an exact list, where the user gave one, wins over all of this.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from janus_cluster.preflight.sysfs import NodeRoot, read_text

_PORT_FILES = ("state", "phys_state", "rate", "link_layer")
# Linux that lets an HCA register a DMA-BUF. Source: kernel commit bfe0cc6eb249 (RDMA/uverbs), 5.12.
_DMA_BUF_SINCE = (5, 12)
# Counters that only grow when something goes wrong. Source: kernel, Documentation/ABI/stable/sysfs-class-infiniband
ERROR_COUNTERS = (
    "symbol_error",
    "link_error_recovery",
    "link_downed",
    "port_rcv_errors",
    "port_rcv_remote_physical_errors",
    "port_xmit_discards",
    "port_xmit_constraint_errors",
    "port_rcv_constraint_errors",
    "local_link_integrity_errors",
    "excessive_buffer_overrun_errors",
)

Port = dict[str, str]


def read_hcas(root: NodeRoot) -> dict[str, Any]:
    """Facts: each port's state, phys_state, rate and link_layer as the kernel words them, and its adapter's place."""
    ports: list[dict[str, Any]] = []
    for folder in sorted(root.infiniband.glob("*/ports/*"), key=lambda p: (natural(p.parent.parent.name), p.name)):
        device = folder.parent.parent
        port: dict[str, Any] = {"device": device.name, "port": folder.name}
        port |= {name: _told(folder / name) for name in _PORT_FILES}
        port |= {"firmware": read_text(device / "fw_ver"), "ca_type": read_text(device / "hca_type")}
        for key, name in (
            ("pcie_width", "current_link_width"),
            ("pcie_width_max", "max_link_width"),
            ("pcie_speed", "current_link_speed"),
            ("numa_node", "numa_node"),
        ):
            port[key] = read_text(device / "device" / name)
        ports.append(port)
    return {"ports": ports, "folder": str(root.infiniband), "exists": root.infiniband.is_dir()}


def _told(path: Path) -> str:
    text = read_text(path)
    return "unreadable" if text is None else text


def read_counters(root: NodeRoot) -> dict[str, dict[str, int]]:
    """`mlx5_0:1` → error counters of the port; a counter that cannot be read is left out."""
    found: dict[str, dict[str, int]] = {}
    for folder in sorted(root.infiniband.glob("*/ports/*/counters")):
        values = {name: read_text(folder / name) for name in ERROR_COUNTERS}
        name = f"{folder.parent.parent.parent.name}:{folder.parent.name}"
        found[name] = {k: int(v) for k, v in values.items() if v is not None and v.isdigit()}
    return found


def read_peermem(root: NodeRoot) -> dict[str, Any]:
    """Facts: the kernel module that lets an HCA read GPU memory, its older name counts too; and whether it can do so
    by DMA-BUF, which needs no module of its own but the open driver (not tainted P) and Linux 5.12.
    """
    taint = read_text(root.sys / "module" / "nvidia" / "taint")
    kernel = re.match(r"(\d+)\.(\d+)", read_text(root.proc / "sys" / "kernel" / "osrelease") or "", re.ASCII)
    is_new = kernel is not None and (int(kernel[1]), int(kernel[2])) >= _DMA_BUF_SINCE
    dma_buf = taint is not None and "P" not in taint and is_new
    for name in ("nvidia_peermem", "nv_peer_mem"):
        folder = root.sys / "module" / name
        if folder.is_dir():
            return {"module": name, "version": read_text(folder / "version"), "dma_buf": dma_buf}
    return {"module": None, "version": None, "dma_buf": dma_buf}


def rails(fact: dict[str, Any], *, chosen: Sequence[str] | None = None) -> list[Port]:
    """The ports that carry the GPUs' traffic, sound or not. `chosen`: `mlx5_0:1` or `mlx5_0` as the user lists them."""
    ports: list[Port] = fact["ports"]
    if chosen:
        return [p for p in ports if p["device"] in chosen or port_name(p) in chosen]
    candidates = [p for p in ports if p["link_layer"] not in ("Ethernet",) and not _is_no_rail_by_name(p)]
    kinds = Counter(p.get("ca_type") for p in candidates)
    if len(kinds) > 1:
        most = max(kinds.values())
        # Equally many: the faster kind is the GPUs'.
        kind = max((k for k, n in kinds.items() if n == most), key=lambda k: _best_rate(candidates, k))
        candidates = [p for p in candidates if p.get("ca_type") in (kind, None)]
    return [p for p in candidates if not _is_spare(p, candidates)]


def _best_rate(ports: Sequence[Port], kind: str | None) -> float:
    return max((rate_gb_per_s(p["rate"]) or 0.0 for p in ports if p.get("ca_type") == kind), default=0.0)


def _is_no_rail_by_name(port: Port) -> bool:
    return "bond" in port["device"]


def _is_spare(port: Port, ports: Sequence[Port]) -> bool:
    """An unused second port: another port of the same adapter is up."""
    siblings = [p for p in ports if p["device"] == port["device"] and p is not port]
    return not is_up(port) and any(is_up(p) for p in siblings)


def is_up(port: Port) -> bool:
    """The kernel's words for a port that carries traffic: `4: ACTIVE` and `5: LinkUp`."""
    return port["state"] == "4: ACTIVE" and port["phys_state"] == "5: LinkUp"


def rate_gb_per_s(text: str) -> float | None:
    """Gb/s of `400 Gb/sec (4X NDR)`, or of ibstat's bare `400`; None for anything else."""
    match = re.match(r"^(\d{1,6}(?:\.\d+)?)(?: Gb/sec(?: \(.*\))?)?$", text, re.ASCII)
    return float(match[1]) if match else None


def port_name(port: Port) -> str:
    """As NCCL_IB_HCA lists it: mlx5_0:1."""
    return f"{port['device']}:{port['port']}"


def natural(name: str) -> tuple[Any, ...]:
    """mlx5_2 before mlx5_10."""
    return tuple(int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name)))


def parse_hca_list(value: str | None) -> list[str] | None:
    """The names of an exact NCCL_IB_HCA (`=mlx5_0:1,mlx5_1`); None for a prefix, an exclusion or nothing."""
    if not value or not value.startswith("="):
        return None
    return [name.strip() for name in value[1:].split(",") if name.strip()]
