"""Which way NCCL really went, from its own log (NCCL_DEBUG=INFO, NCCL_DEBUG_SUBSYS=INIT,NET,GRAPH,ENV)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from janus_cluster.preflight.model import Check, CheckResult

_USING_IB = re.compile(r"NET/IB : Using (?P<ports>\[\d+\].*)")
_PORT = re.compile(r"\[\d+\](?P<name>[^\s:]+:\d+)/(?P<layer>[A-Za-z]+)")
_USING_SOCKET = re.compile(r"NET/Socket : Using (?P<ports>\[\d+\]\S+)")
# A number in brackets is the rank through whose HCA it goes (PXN). IBext and IBext_v8 are a plugin's names for IB.
_CHANNEL = re.compile(r"via NET/(?P<net>IB|Socket)(?:ext\w*)?/(?P<index>\d+)(?:\(\d+\))?(?P<gdr>/GDRDMA)?")
_NETWORK = re.compile(r"Using network (?P<net>\S+)")


def parse_nccl_log(lines: Iterable[str]) -> dict[str, Any]:
    """Facts: ports that NCCL found, networks that it chose, and how many channels go which way.

    A log that says nothing of the network gives empty facts, never a default.
    """
    ports: dict[str, str] = {}
    networks: set[str] = set()
    sockets: set[str] = set()
    channels = {"IB/GDRDMA": 0, "IB": 0, "Socket": 0}
    for line in lines:
        if found := _USING_IB.search(line):
            ports |= {port["name"]: port["layer"] for port in _PORT.finditer(found["ports"])}
        elif found := _USING_SOCKET.search(line):
            sockets.add(found["ports"])
        elif found := _NETWORK.search(line):
            networks.add("IB" if found["net"].startswith("IBext") else found["net"])
        elif found := _CHANNEL.search(line):
            channels["IB/GDRDMA" if found["gdr"] else found["net"]] += 1
    return {"ports": ports, "networks": sorted(networks), "sockets": sorted(sockets), "channels": channels}


def read_nccl_logs(paths: Sequence[Path]) -> dict[str, Any] | None:
    """Facts of all logs of one node together; None where there is none."""
    if not paths:
        return None
    return parse_nccl_log(line for path in paths for line in path.read_text(errors="replace").splitlines())


def judge_transport(
    facts: Mapping[str, Any] | None, profile: Mapping[str, Any], *, node: str, num_nodes: int
) -> list[CheckResult]:
    """PASS only if the log shows the wanted network, and GPUDirect RDMA where it is wanted. Nothing said is ERROR."""
    wanted = profile["wanted"]
    gdr = " with GPUDirect RDMA" if profile.get("gdr") else ""
    check = Check(
        id="transport", node=node, expected=f"NET/{wanted}{gdr}", source="NCCL's own log of the probe", phase="active"
    )
    if wanted is None:
        return [check_skip(node, "gloo: NCCL is not used by this profile")]
    if num_nodes < 2:
        return [check_skip(node, "one node: nothing leaves it")]
    if facts is None:
        return [check.judged("ERROR", "NCCL wrote no log", fix="is NCCL_DEBUG or NCCL_DEBUG_FILE overridden?")]
    channels = facts["channels"]
    told = ", ".join(f"{count} channels via NET/{way}" for way, count in channels.items() if count)
    others = [f"{port} is {layer}" for port, layer in facts["ports"].items() if layer != "IB"]
    other = "Socket" if wanted == "IB" else "IB"
    fell_back = channels["Socket"] if wanted == "IB" else channels["IB"] + channels["IB/GDRDMA"]
    chosen = fell_back or other in facts["networks"] or (wanted == "IB" and facts["sockets"])
    fix = f"on {node}: ibstat, NCCL_IB_HCA, NCCL_IB_DISABLE, and NCCL_NET={wanted} so that it fails instead"
    if chosen:
        return [check.judged("FAIL", told or f"NCCL uses {other}: {', '.join(facts['sockets'])}", fix=fix)]
    if not told and wanted not in facts["networks"]:
        return [check.judged("ERROR", "the log does not say which network NCCL uses", fix=fix)]
    if wanted == "IB" and others:
        return [check.judged("FAIL", f"not InfiniBand: {', '.join(others)}", fix="give NCCL_IB_HCA the exact rails")]
    if profile.get("gdr") and (channels["IB"] or not channels["IB/GDRDMA"]):
        fix = f"on {node}: lsmod | grep peermem; nvidia-smi topo -m; NCCL_NET_GDR_LEVEL"
        return [check.judged("FAIL", told or "no channel via GDRDMA", fix=fix)]
    return [check.judged("PASS", told or f"network {wanted}")]


def check_skip(node: str, reason: str) -> CheckResult:
    """The transport was not looked at, for that reason."""
    return Check(id="transport", node=node, expected="", source="profile", phase="active").judged("SKIP", reason)
