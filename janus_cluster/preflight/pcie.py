"""What sends traffic between a GPU and an HCA through the CPU: an IOMMU that translates, and ACS on PCIe switches."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from janus_cluster.preflight.command import run_command
from janus_cluster.preflight.model import Check
from janus_cluster.preflight.sysfs import NodeRoot, read_text
from janus_cluster.run.records.verdict import CheckResult

# Types of an IOMMU group that translate addresses. Source: kernel, sysfs-kernel-iommu_groups.
_TRANSLATING = frozenset({"DMA", "DMA-FQ"})
_DEVICE = re.compile(r"^(?P<address>(?:[0-9a-f]{4}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]) ", re.IGNORECASE)
_ACS = re.compile(r"ACSCtl:.*(?:SrcValid|ReqRedir|CmpltRedir)\+")
_SHOWN = 4


def read_pcie(root: NodeRoot, *, timeout_s: float) -> dict[str, Any]:
    """Facts: IOMMU groups by their type, and the devices with ACS on. Only root sees the latter."""
    groups = root.sys / "kernel" / "iommu_groups"
    types = Counter(text for path in groups.glob("*/type") if (text := read_text(path)) is not None)
    out = run_command(["lspci", "-vvv"], timeout_s=timeout_s)
    return {"iommu_groups": dict(types), **parse_acs(out.stdout), "problem": out.problem}


def parse_acs(text: str) -> dict[str, Any]:
    """`acs`: addresses of the devices whose ACS is on; `is_listed`: whether any ACSCtl could be read."""
    found: list[str] = []
    address = "?"
    for line in text.splitlines():
        if device := _DEVICE.match(line):
            address = device["address"]
        elif _ACS.search(line):
            found.append(address)
    return {"acs": found, "is_listed": "ACSCtl:" in text}


def judge_pcie_paths(fact: dict[str, Any], *, node: str) -> list[CheckResult]:
    """WARN for an IOMMU that translates and for ACS: GPUDirect RDMA then crosses the CPU, at a part of the speed."""
    source = "NCCL user guide, troubleshooting, PCI access control services"
    iommu = Check(id="pcie.iommu", node=node, expected="off, or identity (passthrough)", source=source)
    acs = Check(id="pcie.acs", node=node, expected="off on every PCIe switch", source=source)
    groups = fact["iommu_groups"]
    translating = sum(n for kind, n in groups.items() if kind in _TRANSLATING)
    kinds = ", ".join(f"{n} of type {kind}" for kind, n in sorted(groups.items())) or "no IOMMU group"
    fix = f"on {node}: cat /proc/cmdline; boot with iommu=pt (and intel_iommu=on or amd_iommu=on), or without IOMMU"
    results = [iommu.judged("WARN" if translating else "PASS", kinds, fix=fix)]
    if not fact["is_listed"]:
        return [*results, acs.judged("SKIP", f"ACS is shown to root only ({fact['problem'] or 'lspci printed none'})")]
    on = fact["acs"]
    shown = f"{len(on)} devices with ACS: {', '.join(on[:_SHOWN])}" if on else "off"
    fix = f"on {node}, as root: lspci -vvv | grep ACSCtl; switch it off in the BIOS, or with setpci on the switches"
    return [*results, acs.judged("WARN" if on else "PASS", shown, fix=fix)]
