"""The sandbox's own network: one namespace per host, joined by one bridge per rail inside the controller's namespace.

    this machine ── jc<tag>h │ host0 ─ rail0 ── n1r0 │ ib0  h800-01     rail r: subnet .16r/28 and a bridge of its own:
                             │         rail1 ── n1r1 │ ib1              ib0 receives no packet for ib3
                             │ ctl     …             │ …
                             │         rail0 ── n2r0 │ ib0  h800-02 …
Bridges are in the controller's namespace and not on this machine, so that neither this machine's firewall (Docker
drops bridged packets) nor its routes touch the traffic between nodes. Only rail 0's /28 is routed from here.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from janus_cluster.errors import SandboxFailed
from janus_cluster.sandbox.layout import CONTROLLER, MOST_NODES, NUM_RAILS, node_names
from janus_cluster.sandbox.programs import require_success, run_program
from janus_cluster.sandbox.state import Network, Node

SLURMD_PORT = 6818

# RFC 2544 sets 198.18.0.0/15 aside for benchmarks between own devices: unlike 10/8, no office or cloud network uses it.
_POOL = ipaddress.IPv4Network("198.18.0.0/15")
_CONTROLLER_OFFSET = 14
_HOST_OFFSET = 13


@dataclass(frozen=True)
class NetworkPlan:
    """All names and addresses of the network, before any of it exists."""

    tag: str
    subnet: ipaddress.IPv4Network
    num_nodes: int

    @property
    def controller_namespace(self) -> str:
        return f"jc{self.tag}-{CONTROLLER}"

    @property
    def host_interface(self) -> str:
        return f"jc{self.tag}h"

    def namespace(self, index: int) -> str:
        return f"jc{self.tag}-{index + 1}"

    def address(self, index: int, rail: int) -> str:
        """Address of node `index` (from 0) on that rail."""
        return str(self.subnet[16 * rail + index + 1])

    def network(self) -> Network:
        return Network(
            subnet=str(self.subnet),
            controller_namespace=self.controller_namespace,
            controller_address=str(self.subnet[_CONTROLLER_OFFSET]),
            host_interface=self.host_interface,
            host_address=str(self.subnet[_HOST_OFFSET]),
        )

    def nodes(self, mounts: Sequence[str]) -> tuple[Node, ...]:
        """The nodes, with their own folders as given in `mounts`."""
        return tuple(
            Node(
                name=name,
                address=self.address(i, 0),
                port=SLURMD_PORT,
                mnt=mounts[i],
                rails={f"ib{rail}": self.address(i, rail) for rail in range(NUM_RAILS)},
                namespace=self.namespace(i),
            )
            for i, name in enumerate(node_names(self.num_nodes))
        )


def rail_port(node_index: int, rail: int) -> str:
    """Name of the bridge's end of a rail's cable, in the controller's namespace."""
    return f"n{node_index + 1}r{rail}"


def pick_subnet(tag: str, taken: Iterable[ipaddress.IPv4Network]) -> ipaddress.IPv4Network:
    """A /24 of the benchmark range that overlaps nothing in `taken`; the search begins at the tag.

    Raises:  SandboxFailed if none is free.
    """
    subnets = list(_POOL.subnets(new_prefix=24))
    # Routes wider than the pool (the default route, a VPN's 0.0.0.0/1) do not own it.
    busy = [t for t in taken if t.prefixlen > _POOL.prefixlen]
    start = int(tag, 16) % len(subnets)
    for subnet in subnets[start:] + subnets[:start]:
        if not any(subnet.overlaps(t) for t in busy):
            return subnet
    raise SandboxFailed(
        f"no /24 of {_POOL} is free of routes on this machine", hint="janus-cluster sandbox up --mode plain"
    )


def parse_routes(text: str) -> list[ipaddress.IPv4Network]:
    """The networks in what `ip -j -4 route show table all` prints."""
    return [
        ipaddress.IPv4Network(route["dst"], strict=False)
        for route in json.loads(text or "[]")
        if route.get("dst", "default") != "default"
    ]


def plan_network(tag: str, *, num_nodes: int) -> NetworkPlan:
    """A plan that fits between this machine's present routes."""
    routes = parse_routes(require_success(["ip", "-j", "-4", "route", "show", "table", "all"]))
    return NetworkPlan(tag, pick_subnet(tag, routes), num_nodes)


def render_outside(plan: NetworkPlan) -> str:
    """`ip -batch` lines for this machine: the namespaces, and one cable into the controller's."""
    network = plan.network()
    return "\n".join(
        [
            f"netns add {network.controller_namespace}",
            *(f"netns add {plan.namespace(i)}" for i in range(plan.num_nodes)),
            f"link add {network.host_interface} type veth peer name host0 netns {network.controller_namespace}",
            f"addr add {network.host_address}/28 dev {network.host_interface}",
            f"link set {network.host_interface} up",
            "",
        ]
    )


def render_fabric(plan: NetworkPlan) -> str:
    """`ip -batch` lines for the controller's namespace: a bridge per rail and a cable per rail and node."""
    lines = ["link set lo up"]
    for rail in range(NUM_RAILS):
        lines += [f"link add rail{rail} type bridge", f"link set rail{rail} up"]
        for i in range(plan.num_nodes):
            port = rail_port(i, rail)
            lines += [
                f"link add {port} type veth peer name ib{rail} netns {plan.namespace(i)}",
                f"link set {port} master rail{rail} up",
            ]
    lines += ["link set host0 master rail0 up", f"addr add {plan.network().controller_address}/28 dev rail0", ""]
    return "\n".join(lines)


def render_node(plan: NetworkPlan, index: int) -> str:
    """`ip -batch` lines for a node's namespace: loopback and its rails' addresses."""
    lines = ["link set lo up"]
    for rail in range(NUM_RAILS):
        lines += [f"addr add {plan.address(index, rail)}/28 dev ib{rail}", f"link set ib{rail} up"]
    return "\n".join([*lines, ""])


def build_network(plan: NetworkPlan) -> None:
    """All of the plan exists. Raises: SandboxFailed with ip's message; part of it may then exist."""
    require_success(["ip", "-batch", "-"], stdin=render_outside(plan))
    require_success(["ip", "-n", plan.controller_namespace, "-batch", "-"], stdin=render_fabric(plan))
    for i in range(plan.num_nodes):
        require_success(["ip", "-n", plan.namespace(i), "-batch", "-"], stdin=render_node(plan, i))


def namespace_names(tag: str) -> list[str]:
    """Every namespace that a sandbox of this tag may have, whether or not it exists."""
    return [f"jc{tag}-{CONTROLLER}", *(f"jc{tag}-{i + 1}" for i in range(MOST_NODES))]


def find_namespaces(tag: str) -> list[str]:
    """Those of them that exist."""
    listed = run_program(["ip", "netns", "list"]).stdout.split("\n")
    existing = {line.split()[0] for line in listed if line.strip()}
    return [name for name in namespace_names(tag) if name in existing]


def find_pids(namespaces: Iterable[str]) -> list[int]:
    """Every process in those namespaces; all of them are this sandbox's."""
    return [int(pid) for name in namespaces for pid in run_program(["ip", "netns", "pids", name]).stdout.split()]


def remove_network(tag: str) -> None:
    """Neither namespace nor interface of this sandbox is left; done twice, the second finds nothing to do."""
    interface = f"jc{tag}h"
    if run_program(["ip", "link", "show", interface]).returncode == 0:
        run_program(["ip", "link", "del", interface])
    for name in find_namespaces(tag):
        require_success(["ip", "netns", "del", name])


def parse_subnet(network: Network) -> ipaddress.IPv4Network:
    """The network's /24."""
    return ipaddress.IPv4Network(network.subnet)
