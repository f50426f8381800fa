"""Which network NCCL used, from its own log (NCCL_DEBUG=INFO, NCCL_DEBUG_SUBSYS=INIT,NET,GRAPH,ENV)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from janus_cluster.preflight.model import Check
from janus_cluster.run.records.verdict import CheckResult

_USING_IB = re.compile(r"NET/IB : Using (?P<ports>\[\d+\].*)")
# Also merged ports: [0]={[0] mlx5_0:1/RoCE, [1] mlx5_1:1/RoCE}.
_PORT = re.compile(r"\[\d+\] ?(?P<name>[^\s:{}\[\],]+:\d+)/(?P<layer>[A-Za-z]+)")
_LISTED = re.compile(r":\d+/")
_NO_DEVICE = re.compile(r"NET/IB ?: No device found|Failed to initialize any NET plugin|network \S+ not found")
_ANY_CHANNEL = re.compile(r"via NET/")
_USING_SOCKET = re.compile(r"NET/Socket : Using (?P<ports>\[\d+\]\S+)")
# A number in brackets is the rank through whose HCA it goes (PXN). IBext and IBext_v8 are a plugin's names for IB.
_CHANNEL = re.compile(r"via NET/(?P<net>IB|Socket)(?:ext\w*)?/(?P<index>\d+)(?:\(\d+\))?(?P<gdr>/GDRDMA)?")
_NETWORK = re.compile(r"Using network (?P<net>\S+)")


def parse_nccl_log(lines: Iterable[str]) -> dict[str, Any]:
    """Facts: ports that NCCL found, networks that it chose, and how many channels go which way.

    A log without a line on the network gives empty facts, never a default. `problems`: NCCL's words on a network
    that it cannot use; `unread`: lines on ports or channels that do not parse.
    """
    ports: dict[str, str] = {}
    networks: set[str] = set()
    sockets: set[str] = set()
    channels = {"IB/GDRDMA": 0, "IB": 0, "Socket": 0}
    problems: list[str] = []
    unread: list[str] = []
    for line in lines:
        if found := _USING_IB.search(line):
            listed = re.split(r" \[RO\]|; OOB", found["ports"])[0]
            named = {port["name"]: port["layer"] for port in _PORT.finditer(listed)}
            unread += [] if named and len(_LISTED.findall(listed)) == len(named) else [line.strip()[:200]]
            ports |= named
        elif found := _NO_DEVICE.search(line):
            problems.append(found[0])
        elif found := _USING_SOCKET.search(line):
            sockets.add(found["ports"])
        elif found := _NETWORK.search(line):
            networks.add("IB" if found["net"].startswith("IBext") else found["net"])
        elif found := _CHANNEL.search(line):
            channels["IB/GDRDMA" if found["gdr"] else found["net"]] += 1
        elif _ANY_CHANNEL.search(line):
            unread.append(line.strip()[:200])
    return {
        "ports": ports,
        "networks": sorted(networks),
        "sockets": sorted(sockets),
        "channels": channels,
        "problems": list(dict.fromkeys(problems)),
        "unread": unread[:3],
    }


def read_nccl_logs(paths: Sequence[Path]) -> dict[str, Any] | None:
    """Facts of all logs of one node together; None where there is none."""
    if not paths:
        return None
    return parse_nccl_log(line for path in paths for line in path.read_text(errors="replace").splitlines())


def judge_transport(
    facts: Mapping[str, Any] | None, profile: Mapping[str, Any], *, node: str, num_nodes: int
) -> list[CheckResult]:
    """PASS only if the log shows the expected network, with GPUDirect RDMA where required. No such line: ERROR."""
    wanted = profile["wanted"]
    gdr = " with GPUDirect RDMA" if profile.get("gdr") else ""
    check = Check(
        id="transport", node=node, expected=f"NET/{wanted}{gdr}", source="NCCL's own log of the probe", phase="active"
    )
    if wanted is None:
        return [check_skip(node, "this profile expects no particular network of NCCL")]
    if num_nodes < 2:
        return [check_skip(node, "one node: nothing leaves it")]
    if facts is None:
        return [check.judged("ERROR", "NCCL wrote no log", fix="is NCCL_DEBUG or NCCL_DEBUG_FILE overridden?")]
    channels = facts["channels"]
    measured = ", ".join(f"{count} channels via NET/{way}" for way, count in channels.items() if count)
    layer = profile.get("layer", "IB")
    others = [f"{port} is {own}" for port, own in facts["ports"].items() if own != layer]
    other = "Socket" if wanted == "IB" else "IB"
    fell_back = channels["Socket"] if wanted == "IB" else channels["IB"] + channels["IB/GDRDMA"]
    chosen = fell_back or other in facts["networks"] or (wanted == "IB" and facts["sockets"])
    fix = f"on {node}: ibstat, NCCL_IB_HCA, NCCL_IB_DISABLE, and NCCL_NET={wanted} so that it fails instead"
    if chosen:
        return [check.judged("FAIL", measured or f"NCCL uses {other}: {', '.join(facts['sockets'])}", fix=fix)]
    if wanted == "IB" and facts["problems"]:
        return [check.judged("FAIL", "; ".join(facts["problems"]), fix=fix)]
    if facts["unread"]:
        return [check.judged("ERROR", f"not parsed: {facts['unread'][0]}", fix=fix)]
    if wanted == "IB" and not facts["ports"]:
        return [check.judged("ERROR", "the log does not show which ports NCCL uses", fix=fix)]
    if not measured and wanted not in facts["networks"]:
        return [check.judged("ERROR", "the log does not show which network NCCL uses", fix=fix)]
    if wanted == "IB" and others:
        fix = "give NCCL_IB_HCA the exact rails: --set environment.variables.NCCL_IB_HCA==mlx5_0:1,…"
        return [check.judged("FAIL", f"not {layer}: {', '.join(others)}", fix=fix)]
    if profile.get("gdr") and (channels["IB"] or not channels["IB/GDRDMA"]):
        fix = f"on {node}: lsmod | grep peermem; nvidia-smi topo -m; NCCL_NET_GDR_LEVEL"
        return [check.judged("FAIL", measured or "no channel via GDRDMA", fix=fix)]
    return [check.judged("PASS", measured or f"network {wanted}")]


def check_skip(node: str, reason: str) -> CheckResult:
    """The transport was not judged, for that reason."""
    return Check(id="transport", node=node, expected="", source="profile", phase="active").judged("SKIP", reason)
