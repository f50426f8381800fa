"""What `ibstat` says: channel adapters and ports, and every line that does not belong to one."""

from __future__ import annotations

import re
from typing import Any

from janus_cluster.preflight.command import run_command

_CA = re.compile(r"^CA '([^']+)'$")
_PORT = re.compile(r"^Port (\d+):$")
_PAIR = re.compile(r"^([A-Z][A-Za-z ]*): (.+)$")
_CA_KEYS = {"CA type": "ca_type", "Number of ports": "num_ports", "Firmware version": "firmware"}
_PORT_KEYS = {"State": "state", "Physical state": "phys_state", "Rate": "rate", "Link layer": "link_layer"}
# Told but not judged; a key that is on neither list is kept as damage.
_OTHER_KEYS = frozenset(
    ["Hardware version", "Node GUID", "System image GUID", "Base lid", "LMC", "SM lid", "Capability mask", "Port GUID"]
)


def read_ibstat(*, timeout_s: float) -> dict[str, Any]:
    """Facts: its text and why it is not to be trusted as whole (ibpanic ends it with 255 after valid blocks)."""
    out = run_command(["ibstat"], timeout_s=timeout_s)
    return {"text": out.stdout, "stderr": out.stderr.strip()[:500], "problem": out.problem, "error": out.error}


def read_verbs(*, timeout_s: float) -> dict[str, Any]:
    """Facts: what ibv_devices lists, that is what libibverbs (and so NCCL) can open."""
    out = run_command(["ibv_devices"], timeout_s=timeout_s)
    return {"text": out.stdout, "problem": out.problem, "error": out.error}


def parse_ibstat(text: str) -> dict[str, Any]:
    """Ports with their adapter's type and firmware; under `damaged` what is cut, twice there or of no known shape."""
    ports: list[dict[str, str]] = []
    damaged: list[str] = []
    ca: dict[str, str] | None = None
    port: dict[str, str] | None = None
    seen: set[str] = set()
    for raw in text.splitlines():
        line = raw.strip()
        if not line:
            continue
        if match := _CA.match(line):
            ca, port = {"device": match[1]}, None
            if match[1] in seen:
                damaged.append(line)
            seen.add(match[1])
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
    return {"ports": ports, "damaged": damaged}


def _take_pair(line: str, ca: dict[str, str] | None, port: dict[str, str] | None) -> bool:
    """True when the line is a value of this adapter or port that was not told before."""
    match = _PAIR.match(line)
    if match is None or ca is None:
        return False
    key, value = match[1], match[2]
    if key in _OTHER_KEYS:
        return True
    into, names = (port, _PORT_KEYS) if port is not None else (ca, _CA_KEYS)
    name = names.get(key)
    if name is None or name in into:
        return False
    into[name] = value
    return True


def parse_verbs(text: str) -> list[str]:
    """The devices that ibv_devices lists: every line of a name and a 16-digit GUID; its two header lines are none."""
    found = (re.match(r"^\s*(\S+)\s+([0-9a-f]{16})\s*$", line) for line in text.splitlines())
    return [m[1] for m in found if m]
