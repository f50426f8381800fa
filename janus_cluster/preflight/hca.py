"""Ports of HCAs as the kernel shows them in sysfs, and which of them are the rails of the GPUs.

A port is a rail when it has the profile's link layer and its adapter is of the kind that most such ports are: storage
adapters are another kind. Virtual functions are no rails; nor is the free second port of an adapter whose first one is
up, nor what NCCL_IB_HCA, in any of its forms, leaves out. As an exact list (=mlx5_0:1,…) it overrides all of this.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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

INFINIBAND, ETHERNET = "InfiniBand", "Ethernet"
# hca_type of virtual functions. Source: Linux, mlx4 and mlx5 device tables (0x1004, 0x1012, 0x1014, …, 0xa2d3).
_VIRTUAL_TYPES = frozenset(f"MT{n}" for n in (4100, 4114, 4116, 4118, 4120, 4122, 4124, 4126, 41683))

Port = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class NcclList:
    """NCCL_IB_HCA or NCCL_SOCKET_IFNAME: names, with a port (None: any); exact or prefixes; to take or to leave out.

    Source: NCCL, parseStringList and matchIfList.
    """

    entries: tuple[tuple[str, str | None], ...]
    is_exact: bool
    is_excluding: bool

    @property
    def is_choice(self) -> bool:
        """An exact list of the ports to take: nothing else decides which ports are rails."""
        return self.is_exact and not self.is_excluding

    def takes(self, name: str, port: str = "") -> bool:
        """Whether NCCL would take what has this name."""
        is_listed = any(
            (name == listed if self.is_exact else name.startswith(listed)) and number in (None, port)
            for listed, number in self.entries
        )
        return is_listed is not self.is_excluding

    def selects(self, port: Port) -> bool:
        """Whether NCCL would take this port of an HCA."""
        return self.takes(port["device"], port["port"])

    def absent(self, ports: Sequence[Port]) -> list[str]:
        """Entries of an exact choice that name no port."""
        if not self.is_choice:
            return []
        alone = [replace(self, entries=(entry,)) for entry in self.entries]
        shown = [":".join(filter(None, one.entries[0])) for one in alone]
        return [name for name, one in zip(shown, alone, strict=True) if not any(one.selects(p) for p in ports)]


def read_hcas(root: NodeRoot) -> dict[str, Any]:
    """Facts: each port's state, phys_state, rate and link_layer in the kernel's spelling, and its adapter's PCIe.

    near_gpu: whether the adapter is behind the same root port as a GPU, as a rail is and storage is not.
    """
    ports: list[dict[str, Any]] = []
    near_gpus = {slot for gpu in root.sys.glob("bus/pci/drivers/nvidia/*:*") if (slot := _root_port(gpu))}
    for folder in sorted(root.infiniband.glob("*/ports/*"), key=lambda p: (natural(p.parent.parent.name), p.name)):
        device = folder.parent.parent
        port: dict[str, Any] = {"device": device.name, "port": folder.name}
        port |= {name: _read_attribute(folder / name) for name in _PORT_FILES}
        port |= {"firmware": read_text(device / "fw_ver"), "ca_type": read_text(device / "hca_type")}
        # Only a virtual function has a link to its physical one.
        port["is_virtual"] = (device / "device" / "physfn").exists()
        port["near_gpu"] = _root_port(device / "device") in near_gpus
        for key, name in (
            ("pcie_width", "current_link_width"),
            ("pcie_speed", "current_link_speed"),
            ("pcie_speed_max", "max_link_speed"),
            ("numa_node", "numa_node"),
        ):
            port[key] = read_text(device / "device" / name)
        ports.append(port)
    return {"ports": ports, "folder": str(root.infiniband), "exists": root.infiniband.is_dir()}


def _root_port(device: Path) -> str | None:
    """pci0000:15/0000:15:01.0 of a PCI device in sysfs; None where it is no link into /sys/devices."""
    match = re.search(r"/(pci[0-9a-f]{4,}:[0-9a-f]{2}/[0-9a-f:.]+)/", f"{device.resolve()}/")
    return match[1] if match else None


def _read_attribute(path: Path) -> str:
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
    """Facts: the kernel module that lets an HCA read GPU memory (also under its older name), and whether DMA-BUF works.

    DMA-BUF needs no module, but the open driver (not tainted P) and Linux 5.12.
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


def rails(fact: dict[str, Any], *, chosen: NcclList | None = None, link_layer: str = INFINIBAND) -> list[Port]:
    """The ports that carry the GPUs' traffic, sound or not. `chosen`: the user's NCCL_IB_HCA."""
    ports: list[Port] = fact["ports"]
    if chosen is not None:
        ports = [p for p in ports if chosen.selects(p)]
        if chosen.is_choice:
            return ports
    other = ETHERNET if link_layer == INFINIBAND else INFINIBAND
    candidates = [p for p in ports if p["link_layer"] != other and not p.get("is_virtual")]
    if link_layer == INFINIBAND:
        candidates = [p for p in candidates if not _is_no_rail_by_name(p)]
    # In a virtual machine the functions that it was given are all it has.
    candidates = [p for p in candidates if p.get("ca_type") not in _VIRTUAL_TYPES] or candidates
    kinds = Counter(p.get("ca_type") for p in candidates)
    if len(kinds) > 1:
        most = max(kinds.values())
        # Equally many: the faster kind is the GPUs'.
        kind = max((k for k, n in kinds.items() if n == most), key=lambda k: _best_rate(candidates, k))
        candidates = [p for p in candidates if p.get("ca_type") in (kind, None)]
    return [p for p in candidates if not _is_spare(p, candidates)]


def usable_rails(fact: dict[str, Any], profile: Mapping[str, Any], *, chosen: NcclList | None = None) -> list[Port]:
    """The rails that are up, without those that are slower than the profile's where some are not: storage."""
    found = [p for p in rails(fact, chosen=chosen, link_layer=profile["link_layer"]) if is_up(p)]
    fast = [p for p in found if (rate_gb_per_s(p["rate"]) or 0.0) >= profile["rate_gb_per_s_min"]]
    return fast or found


def _best_rate(ports: Sequence[Port], kind: str | None) -> float:
    return max((rate_gb_per_s(p["rate"]) or 0.0 for p in ports if p.get("ca_type") == kind), default=0.0)


def _is_no_rail_by_name(port: Port) -> bool:
    return "bond" in port["device"]


def _is_spare(port: Port, ports: Sequence[Port]) -> bool:
    """An unused second port: another port of the same adapter is up."""
    siblings = [p for p in ports if p["device"] == port["device"] and p is not port]
    return not is_up(port) and any(is_up(p) for p in siblings)


def is_up(port: Port) -> bool:
    """The kernel's values for a port that carries traffic: `4: ACTIVE` and `5: LinkUp`."""
    return (port["state"], port["phys_state"]) == ("4: ACTIVE", "5: LinkUp")


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


def parse_nccl_list(value: str | None) -> NcclList | None:
    """NCCL_IB_HCA as `mlx5`, `=mlx5_0:1,mlx5_1`, `^mlx5_8` or `^=mlx5_8`; None for nothing."""
    text = (value or "").strip()
    is_excluding = text.startswith("^")
    text = text.removeprefix("^")
    is_exact = text.startswith("=")
    names = [name.strip().partition(":") for name in text.removeprefix("=").split(",") if name.strip()]
    entries = tuple((name, port or None) for name, _, port in names)
    return NcclList(entries=entries, is_exact=is_exact, is_excluding=is_excluding) if entries else None


def chosen_hcas(environ: Mapping[str, str], own: Mapping[str, str]) -> NcclList | None:
    """NCCL_IB_HCA of the node's processes, else of the job's own variables."""
    return parse_nccl_list(environ.get("NCCL_IB_HCA") or own.get("NCCL_IB_HCA"))
