"""Which interface leads to the peer, and how fast it is. Nothing is sent."""

from __future__ import annotations

import socket
from collections.abc import Collection, Mapping
from typing import Any

from janus_cluster.preflight.interfaces import read_own_addresses
from janus_cluster.preflight.model import Check
from janus_cluster.preflight.sysfs import NodeRoot, read_text
from janus_cluster.run.records.verdict import CheckResult

_RTF_UP = 1


def read_route(peer: str | None, root: NodeRoot) -> dict[str, Any]:
    """Facts: interface and own address of the route to `peer`, or of the default route; else `error`."""
    try:
        interface, source = _route_to(peer) if peer else (parse_default_route(_routes(root)), None)
    except OSError as e:
        return {"peer": peer, "interface": None, "error": f"no route to {peer}: {e.strerror or e}"}
    if interface is None:
        return {"peer": peer, "interface": None, "error": f"no interface leads to {peer or 'the default route'}"}
    folder = root.sys / "class" / "net" / interface
    link = {"operstate": read_text(folder / "operstate"), "speed_mb_per_s": _number(read_text(folder / "speed"))}
    return {"peer": peer, "interface": interface, "source": source, "error": None, **link}


def _route_to(peer: str) -> tuple[str | None, str]:
    """A connected UDP socket has the kernel's choice of source address; no packet leaves."""
    source = source_towards(peer)
    return find_owner(source, read_own_addresses()), source


def source_towards(peer: str) -> str:
    """The address from which this host sends to `peer`: IPv4, or IPv6 where the peer has no other. Raises: OSError."""
    found = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)
    family, kind, proto, _, address = next((info for info in found if info[0] == socket.AF_INET), found[0])
    with socket.socket(family, kind, proto) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0]).partition("%")[0]


def find_owner(address: str, addresses: Mapping[str, Collection[str]]) -> str | None:
    """The interface that has the address."""
    return next((name for name, own in addresses.items() if address in own), None)


def _routes(root: NodeRoot) -> str:
    return read_text(root.proc / "net" / "route") or ""


def parse_default_route(text: str) -> str | None:
    """The interface of the default route with the lowest metric in /proc/net/route; None without one."""
    found: list[tuple[int, str]] = []
    for line in text.splitlines()[1:]:
        cells = line.split()
        is_default = len(cells) >= 8 and cells[1] == "00000000" and cells[7] == "00000000"
        if is_default and cells[6].isdigit() and cells[3].isalnum() and _flags(cells[3]) & _RTF_UP:
            found.append((int(cells[6]), cells[0]))
    return min(found)[1] if found else None


def _flags(text: str) -> int:
    try:
        return int(text, 16)
    except ValueError:
        return 0


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() else None


def judge_route(fact: dict[str, Any], profile: dict[str, Any], *, node: str) -> list[CheckResult]:
    """The interface is known, up and, where training's traffic goes through it, fast enough.

    SKIP for a job of one node, which has no peer: nodes of a cluster often have no default route, or a slow one.
    Units: Mb/s, as the kernel reports a link's speed.
    """
    if not profile["wanted"]:
        return []
    floor = profile.get("speed_mb_per_s_min")
    expected = f"up, >= {floor} Mb/s" if floor else "an interface that is up"
    check = Check(id="net.interface", node=node, expected=expected, source=profile["source"], unit="Mb/s")
    if fact["peer"] is None:
        return [check.judged("SKIP", f"one node: nothing leaves it (default route: {fact['interface'] or 'none'})")]
    if fact["interface"] is None:
        return [check.judged("ERROR", str(fact["error"]), fix=f"on {node}: ip route; set NCCL_SOCKET_IFNAME")]
    speed = fact["speed_mb_per_s"]
    measured = f"{fact['interface']}: {fact['operstate'] or 'state not reported'}, {speed or '?'} Mb/s"
    if fact["operstate"] == "down":
        return [check.judged("FAIL", measured, fix=f"on {node}: ip link show {fact['interface']}")]
    if floor and speed is None:
        return [
            check.judged(
                "WARN", measured, fix=f"on {node}: ethtool {fact['interface']} (a virtual link reports no speed)"
            )
        ]
    if floor and speed is not None and speed < floor:
        fix = f"on {node}: ethtool {fact['interface']}; or set NCCL_SOCKET_IFNAME to the faster one"
        return [check.judged("FAIL", measured, fix=fix)]
    return [check.judged("PASS", measured)]
