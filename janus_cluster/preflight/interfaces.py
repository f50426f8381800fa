"""Network interfaces as the kernel tells them, and the rails between nodes that follow from them."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from janus_cluster.preflight.model import Check, CheckResult, State
from janus_cluster.preflight.sysfs import read_text

_SYSFS = Path("/sys/class/net")
_SIOCGIFADDR, _SIOCGIFNETMASK = 0x8915, 0x891B
# rx_dropped is left out: it also counts packets of protocols that nobody here speaks.
ERROR_COUNTERS = ("rx_errors", "tx_errors", "tx_dropped", "rx_crc_errors", "tx_carrier_errors")

Interface = dict[str, Any]


def read_interfaces(root: Path = _SYSFS) -> list[Interface]:
    """Facts: interfaces with an IPv4 address; no loopback, bridge or tunnel.

    Units:   speed in Mb/s; -1 or None where the link tells none. carrier: None where the interface is switched off.
    """
    found: list[Interface] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            folder = root / name
            if name == "lo" or (folder / "bridge").exists() or (folder / "tun_flags").exists():
                continue
            address, mask = (_ask(probe, name, what) for what in (_SIOCGIFADDR, _SIOCGIFNETMASK))
            if address and mask:
                network = str(ipaddress.IPv4Interface(f"{address}/{mask}").network)
                carrier = read_text(folder / "carrier")
                speed = read_text(folder / "speed")
                found.append(
                    {
                        "name": name,
                        "address": address,
                        "network": network,
                        "carrier": carrier == "1" if carrier is not None else None,
                        "speed_mb_per_s": int(speed) if speed and speed.lstrip("-").isdigit() else None,
                    }
                )
    return found


def read_interface_counters(root: Path = _SYSFS) -> dict[str, dict[str, int]]:
    """Interface → its error counters."""
    counters = {}
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        values = {name: read_text(folder / "statistics" / name) for name in ERROR_COUNTERS}
        counters[folder.name] = {k: int(v) for k, v in values.items() if v is not None and v.isdigit()}
    return counters


def _ask(probe: socket.socket, name: str, what: int) -> str | None:
    try:
        return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), what, struct.pack("256s", name.encode()[:15]))[20:24])
    except OSError:
        return None  # no IPv4 address


def find_rails(interfaces: Mapping[str, Sequence[Interface]]) -> list[dict[str, Any]]:
    """The networks that all nodes share: {name, interfaces: node → interface}, whether or not they have a carrier.

    Interfaces of one name and network belong together; otherwise the only ones of that network do. The same address on
    two nodes is no rail: both are this machine, or it is a bridge that every host has.
    """
    if len(interfaces) < 2:
        return []
    first, *others = interfaces.items()
    rails = []
    for own in first[1]:
        ends = {first[0]: own}
        for node, theirs in others:
            near = [i for i in theirs if i["network"] == own["network"]]
            named = [i for i in near if i["name"] == own["name"]]
            if named or len(near) == 1:
                ends[node] = (named or near)[0]
        addresses = {end["address"] for end in ends.values()}
        if len(ends) == len(interfaces) == len(addresses):
            rails.append({"name": own["name"], "interfaces": ends})
    return rails


def plan_rails(interfaces: Mapping[str, Sequence[Interface]]) -> list[dict[str, Any]]:
    """The rails that can be tested: {name, interfaces: node → its interface's name}. One without a carrier cannot."""
    return [
        {"name": rail["name"], "interfaces": {node: end["name"] for node, end in rail["interfaces"].items()}}
        for rail in find_rails(interfaces)
        if all(end["carrier"] for end in rail["interfaces"].values())
    ]


def judge_links(
    rails: Sequence[Mapping[str, Any]], nodes: Sequence[str], *, carry_the_data: bool = True
) -> list[CheckResult]:
    """FAIL for a node whose end of a shared network has no carrier: that end is known, so the node is.

    WARN where the data goes another way: Ethernet ports that are down are normal on sound nodes with InfiniBand.
    """
    results = []
    for node in nodes:
        check = Check(
            id="net.links", node=node, expected="carrier on every network that the nodes share", source="kernel"
        )
        ends = [rail["interfaces"][node] for rail in rails]
        down = [end["name"] for end in ends if not end["carrier"]]
        fix = f"on {node}: ip link show {down[0] if down else ''}; is the cable in, is the switch port up?"
        told = f"no carrier on {', '.join(down)}" if down else ", ".join(end["name"] for end in ends) + " up"
        if rails:
            bad: State = "FAIL" if carry_the_data else "WARN"
            results.append(check.judged(bad if down else "PASS", told, fix=fix))
    return results
