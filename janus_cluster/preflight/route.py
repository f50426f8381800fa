"""Which interface leads to the peer, and how fast it is. Nothing is sent."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Mapping
from typing import Any

from janus_cluster.preflight.model import Check, CheckResult
from janus_cluster.preflight.sysfs import NodeRoot, read_text

_SIOCGIFADDR, _SIOCGIFNETMASK = 0x8915, 0x891B
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
    told = {"operstate": read_text(folder / "operstate"), "speed_mb_per_s": _number(read_text(folder / "speed"))}
    return {"peer": peer, "interface": interface, "source": source, "error": None, **told}


def _route_to(peer: str) -> tuple[str | None, str]:
    """A connected UDP socket has the kernel's choice of source address; no packet leaves."""
    family, kind, proto, _, address = socket.getaddrinfo(peer, 9, socket.AF_INET, socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, proto) as probe:
        probe.connect(address)
        source = str(probe.getsockname()[0])
        networks = {name: told for _, name in socket.if_nameindex() if (told := _network_of(probe, name)) is not None}
    return find_owner(source, networks), source


def find_owner(address: str, networks: Mapping[str, ipaddress.IPv4Interface]) -> str | None:
    """The interface that has the address; else, because the kernel tells the first one of each only, the one of its
    network."""
    own = ipaddress.IPv4Address(address)
    owners = [name for name, told in networks.items() if told.ip == own]
    owners += [name for name, told in networks.items() if own in told.network]
    return owners[0] if owners else None


def _network_of(probe: socket.socket, interface: str) -> ipaddress.IPv4Interface | None:
    request = struct.pack("256s", interface.encode()[:15])
    try:
        told = [fcntl.ioctl(probe.fileno(), what, request)[20:24] for what in (_SIOCGIFADDR, _SIOCGIFNETMASK)]
    except OSError:
        return None  # an interface without an IPv4 address
    return ipaddress.IPv4Interface("/".join(map(socket.inet_ntoa, told)))


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
    Units: Mb/s, as the kernel tells a link's speed.
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
    measured = f"{fact['interface']}: {fact['operstate'] or 'state not told'}, {speed or '?'} Mb/s"
    if fact["operstate"] == "down":
        return [check.judged("FAIL", measured, fix=f"on {node}: ip link show {fact['interface']}")]
    if floor and speed is None:
        return [
            check.judged(
                "WARN", measured, fix=f"on {node}: ethtool {fact['interface']} (a virtual link tells no speed)"
            )
        ]
    if floor and speed is not None and speed < floor:
        fix = f"on {node}: ethtool {fact['interface']}; or set NCCL_SOCKET_IFNAME to the faster one"
        return [check.judged("FAIL", measured, fix=fix)]
    return [check.judged("PASS", measured)]
