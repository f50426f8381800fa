"""Network interfaces as the kernel reports them, and the rails between nodes that follow from them."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from janus_cluster.preflight.model import Check
from janus_cluster.preflight.sysfs import NodeRoot, read_text
from janus_cluster.run.records.verdict import CheckResult, State

_SYSFS = Path("/sys/class/net")
# rx_dropped is left out: it also counts packets of protocols that this host does not handle.
ERROR_COUNTERS = ("rx_errors", "tx_errors", "tx_dropped", "rx_crc_errors", "tx_carrier_errors")

Interface = dict[str, Any]


def read_interfaces(root: Path = _SYSFS) -> list[Interface]:
    """Facts: interfaces with an IPv4 address; no loopback, bridge or tunnel.

    Units:   speed in Mb/s; -1 or None where the link reports none. carrier: None where the interface is switched off.
    """
    found: list[Interface] = []
    for name, addresses in read_networks().items():
        folder = root / name
        if name == "lo" or (folder / "bridge").exists() or (folder / "tun_flags").exists():
            continue
        carrier, speed = read_text(folder / "carrier"), read_text(folder / "speed")
        found.append(
            {
                "name": name,
                "address": str(addresses[0].ip),
                "network": str(addresses[0].network),
                "carrier": carrier == "1" if carrier is not None else None,
                "speed_mb_per_s": int(speed) if speed and speed.lstrip("-").isdigit() else None,
            }
        )
    return found


def read_interface_names(root: NodeRoot) -> list[str]:
    """The names of all interfaces, with or without an address; this host's own where the root has none."""
    folder = root.sys / "class" / "net"
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else [name for _, name in socket.if_nameindex()]


def read_own_addresses() -> dict[str, set[str]]:
    """Interface → its addresses, IPv4 and IPv6."""
    import psutil

    found: dict[str, set[str]] = {}
    for label, addresses in psutil.net_if_addrs().items():
        own = {a.address.partition("%")[0] for a in addresses if a.family in (socket.AF_INET, socket.AF_INET6)}
        found.setdefault(label.partition(":")[0], set()).update(own)
    return found


def read_networks() -> dict[str, list[ipaddress.IPv4Interface]]:
    """Interface → its IPv4 addresses with their networks; interfaces without one are left out."""
    import psutil

    found: dict[str, list[ipaddress.IPv4Interface]] = {}
    for label, addresses in psutil.net_if_addrs().items():
        # eth0:1 is eth0 with another address.
        name = label.partition(":")[0]
        own = [
            ipaddress.IPv4Interface(f"{a.address}/{a.netmask or 32}") for a in addresses if a.family is socket.AF_INET
        ]
        found |= {name: [*found.get(name, []), *own]} if own else {}
    return found


def read_interface_counters(root: Path = _SYSFS) -> dict[str, dict[str, int]]:
    """Interface → its error counters."""
    counters = {}
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        values = {name: read_text(folder / "statistics" / name) for name in ERROR_COUNTERS}
        counters[folder.name] = {k: int(v) for k, v in values.items() if v is not None and v.isdigit()}
    return counters


def find_rails(interfaces: Mapping[str, Sequence[Interface]]) -> list[dict[str, Any]]:
    """The networks that nodes share: {name, interfaces: node → interface}, whether or not they have a carrier.

    Shared is what all have, or more than half of three and more: who lacks it is the odd one. Interfaces of one name
    and network belong together; otherwise the only ones of that network do. The same address on two nodes is no rail:
    both are this machine, or it is a bridge that every host has.
    """
    number = len(interfaces)
    least = number if number < 3 else number // 2 + 1
    if number < 2:
        return []
    rails: list[dict[str, Any]] = []
    for own in (interface for of_node in interfaces.values() for interface in of_node):
        if any(own in rail["interfaces"].values() for rail in rails):
            continue
        partners = {node: _partner(own, theirs) for node, theirs in interfaces.items()}
        home = next(theirs for theirs in interfaces.values() if own in theirs)
        ends = {node: end for node, end in partners.items() if end is not None and _partner(end, home) == own}
        addresses = {end["address"] for end in ends.values()}
        if least <= len(ends) == len(addresses):
            rails.append({"name": own["name"], "interfaces": ends})
    return rails


def _partner(own: Interface, theirs: Sequence[Interface]) -> Interface | None:
    """Their interface in this one's network: that of the same name, or the only one."""
    near = [i for i in theirs if i["network"] == own["network"]]
    named = [i for i in near if i["name"] == own["name"]]
    return (named or near)[0] if named or len(near) == 1 else None


def plan_rails(interfaces: Mapping[str, Sequence[Interface]]) -> list[dict[str, Any]]:
    """The rails that can be tested: {name, interfaces: node → its interface's name}.

    One that lacks a node's end, or the carrier there, cannot: that is judged before.
    """
    return [
        {"name": rail["name"], "interfaces": {node: end["name"] for node, end in rail["interfaces"].items()}}
        for rail in find_rails(interfaces)
        if len(rail["interfaces"]) == len(interfaces) and all(end["carrier"] for end in rail["interfaces"].values())
    ]


def judge_links(
    rails: Sequence[Mapping[str, Any]], nodes: Sequence[str], *, carry_the_data: bool = True
) -> list[CheckResult]:
    """FAIL for a node whose end of a shared network is missing or has no carrier.

    WARN where the data takes another network: Ethernet ports that are down are normal on sound nodes with InfiniBand.
    """
    results = []
    for node in nodes:
        check = Check(
            id="net.links", node=node, expected="carrier on every network that the nodes share", source="kernel"
        )
        ends = [rail["interfaces"][node] for rail in rails if node in rail["interfaces"]]
        down = [end["name"] for end in ends if not end["carrier"]]
        missing = [str(rail["name"]) for rail in rails if node not in rail["interfaces"]]
        faults = [f"no carrier on {', '.join(down)}"] if down else []
        faults += [f"no interface on the network of the others' {', '.join(missing)}"] if missing else []
        first = (down or missing or [""])[0]
        fix = f"on {node}: ip address show {first}; is the cable in, is the switch port up, has it an address?"
        measured = "; ".join(faults) or ", ".join(end["name"] for end in ends) + " up"
        if rails:
            bad: State = "FAIL" if carry_the_data else "WARN"
            results.append(check.judged(bad if faults else "PASS", measured, fix=fix))
    return results
