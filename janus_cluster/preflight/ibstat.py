"""Parsed output of `ibstat`: channel adapters and ports, and every line that does not belong to one."""

from __future__ import annotations

import re
from typing import Any

from janus_cluster.preflight.command import run_command

# The heading of an adapter: `CA 'mlx5_0'`, `iWARP RNIC 'i40iw0'`. Source: rdma-core, ibstat.c node_type_str.
_ADAPTER = re.compile(r"^(?P<type>\S[^':]*) '(?P<name>[^']+)'$")
_PORT = re.compile(r"^Port (\d+):$")
_PAIR = re.compile(r"^([A-Za-z][^:]*): *(.*)$")
_CA_KEYS = {"CA type": "ca_type", "Firmware version": "firmware"}
# Without one of these a port is cut. Other keys, also those of a newer rdma-core, are not read.
_PORT_KEYS = {"State": "state", "Physical state": "phys_state", "Rate": "rate", "Link layer": "link_layer"}


def read_ibstat(*, timeout_s: float) -> dict[str, Any]:
    """Facts: its text, and why it may be incomplete (ibpanic ends it with 255 after valid blocks)."""
    out = run_command(["ibstat"], timeout_s=timeout_s)
    return {"text": out.stdout, "stderr": out.stderr.strip()[:500], "problem": out.problem, "error": out.error}


def read_verbs(*, timeout_s: float) -> dict[str, Any]:
    """Facts: what ibv_devices lists, and what ibv_devinfo can open, as libibverbs (and so NCCL) must."""
    out = run_command(["ibv_devices"], timeout_s=timeout_s)
    info = run_command(["ibv_devinfo"], timeout_s=timeout_s)
    opened = {"text": info.stdout, "problem": info.problem, "error": info.error}
    return {"text": out.stdout, "problem": out.problem, "error": out.error, "opened": opened}


def parse_ibstat(text: str) -> dict[str, Any]:
    """Ports with their adapter's type and firmware; under `foreign` the adapters that are no InfiniBand CA.

    `damaged`: lines outside an adapter or without a value, repeated ones, and ports with a needed key missing.
    """
    ports: list[dict[str, str]] = []
    damaged: list[str] = []
    foreign: list[str] = []
    ca: dict[str, str] | None = None
    port: dict[str, str] | None = None
    seen: set[str] = set()
    for raw in text.splitlines():
        line = raw.strip()
        if not line:
            continue
        if match := _ADAPTER.match(line):
            ca, port = ({"device": match["name"]} if match["type"] == "CA" else None), None
            if match["type"] != "CA":
                foreign.append(match["name"])
            elif match["name"] in seen:
                damaged.append(line)
            seen |= {match["name"]} if ca is not None else set()
        elif foreign and ca is None:
            continue
        elif (match := _PORT.match(line)) and ca is not None:
            port = {"device": ca["device"], "port": match[1]}
            if any((p["device"], p["port"]) == (port["device"], port["port"]) for p in ports):
                damaged.append(f"{ca['device']} {line}")
            ports.append(port | {k: v for k, v in ca.items() if k != "device"})
            port = ports[-1]
        elif not _take_pair(line, ca, port):
            damaged.append(line[:200])
    damaged += [f"{p['device']}:{p['port']}: cut" for p in ports if not {*_PORT_KEYS.values()} <= p.keys()]
    damaged += [f"{device}: no port" for device in sorted(seen - {p["device"] for p in ports})]
    return {"ports": ports, "damaged": damaged, "foreign": foreign}


def _take_pair(line: str, ca: dict[str, str] | None, port: dict[str, str] | None) -> bool:
    """True for a value of this adapter or port; False for a line of another shape, or a read key that comes twice."""
    match = _PAIR.match(line)
    if match is None or ca is None:
        return False
    into, names = (port, _PORT_KEYS) if port is not None else (ca, _CA_KEYS)
    name = names.get(match[1])
    if name is None:
        return True
    if name in into:
        return False
    into[name] = match[2]
    return True


def parse_opened(text: str) -> list[str]:
    """The devices that ibv_devinfo opened."""
    return re.findall(r"^hca_id:\s*(\S+)\s*$", text, re.MULTILINE)


def parse_verbs(text: str) -> list[str]:
    """The devices that ibv_devices lists: every line of a name and a 16-digit GUID; its two header lines are none."""
    found = (re.match(r"^\s*(\S+)\s+([0-9a-f]{16})\s*$", line) for line in text.splitlines())
    return [m[1] for m in found if m]
