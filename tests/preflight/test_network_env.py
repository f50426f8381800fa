"""HCA list and socket interface follow from the hardware; the user's own values stay."""

from __future__ import annotations

import socket
from ipaddress import IPv4Interface
from typing import Any

import pytest

from janus_cluster.job.env_lint import lint_env
from janus_cluster.job.profiles import load_preflight_profile
from janus_cluster.preflight.interfaces import read_networks
from janus_cluster.preflight.network_env import derive_network_env
from janus_cluster.preflight.route import find_owner, judge_route, read_route
from janus_cluster.preflight.sysfs import NodeRoot

IB, ETHERNET, CPU = (load_preflight_profile(p) for p in ("h800-ib", "h800-ethernet", "cpu"))
ROUTE = {"interface": "eth0", "source": "10.0.0.1", "peer": "10.0.0.2", "error": None}


def port(device: str, **changes: str) -> dict[str, str]:
    sound = {"state": "4: ACTIVE", "phys_state": "5: LinkUp", "rate": "400 Gb/sec (4X NDR)", "ca_type": "MT4129"}
    return {"device": device, "port": "1", "link_layer": "InfiniBand"} | sound | changes


FACTS: dict[str, Any] = {
    "hca": {"ports": [port("mlx5_0"), port("mlx5_1"), port("mlx5_bond_0", link_layer="Ethernet")]},
    "route": ROUTE,
}


def derive(profile: dict[str, Any], user: dict[str, str] | None = None, **changes: Any) -> dict[str, str]:
    return {v.name: v.value for v in derive_network_env(FACTS | changes, profile, user or {})}


def test_the_list_is_exact_and_gloo_gets_the_bare_name() -> None:
    assert derive(IB) == {
        "NCCL_IB_HCA": "=mlx5_0:1,mlx5_1:1",
        "NCCL_SOCKET_IFNAME": "=eth0",
        "GLOO_SOCKET_IFNAME": "eth0",
    }


def test_what_is_derived_passes_the_lint_and_has_a_reason() -> None:
    derived = derive_network_env(FACTS, IB, {})
    assert lint_env(derived) == []
    assert all(v.reason and v.origin for v in derived)


def test_the_users_own_value_wins() -> None:
    assert derive(IB, {"NCCL_IB_HCA": "mlx5", "GLOO_SOCKET_IFNAME": "ib0"}) == {"NCCL_SOCKET_IFNAME": "=eth0"}


def test_ethernet_and_cpu_get_no_hca_list() -> None:
    assert derive(ETHERNET) == {"NCCL_SOCKET_IFNAME": "=eth0", "GLOO_SOCKET_IFNAME": "eth0"}
    assert derive(CPU) == {"GLOO_SOCKET_IFNAME": "eth0"}


def test_without_rails_or_route_nothing_is_made_up() -> None:
    assert derive(IB, hca={"ports": []}, route={"interface": None, "error": "x"}) == {}


def test_the_route_to_this_host_is_the_loopback() -> None:
    route = read_route("127.0.0.1", NodeRoot.of(None))
    assert (route["interface"], route["source"], route["error"]) == ("lo", "127.0.0.1", None)


def test_a_peer_that_does_not_resolve_is_an_error() -> None:
    route = read_route("no-such-host.invalid", NodeRoot.of(None))
    assert route["interface"] is None
    assert "no-such-host.invalid" in route["error"]


@pytest.mark.parametrize(
    ("reported", "state"),
    [
        ({"operstate": "up", "speed_mb_per_s": 25000}, "PASS"),
        ({"operstate": "up", "speed_mb_per_s": 100000}, "PASS"),
        ({"operstate": "up", "speed_mb_per_s": 10000}, "FAIL"),
        ({"operstate": "up", "speed_mb_per_s": None}, "WARN"),
        ({"operstate": "down", "speed_mb_per_s": 100000}, "FAIL"),
    ],
)
def test_the_interface_that_carries_the_data_is_judged(reported: dict[str, Any], state: str) -> None:
    (result,) = judge_route(ROUTE | reported, ETHERNET["net"], node="n1")
    assert result.state == state


def test_no_interface_is_no_pass() -> None:
    (result,) = judge_route({"peer": "n0", "interface": None, "error": "no route"}, IB["net"], node="n1")
    assert result.state == "ERROR"


@pytest.mark.parametrize("interface", [None, "eth0"])
def test_one_node_needs_no_way_out(interface: str | None) -> None:
    alone = {"peer": None, "interface": interface, "error": None, "operstate": "up", "speed_mb_per_s": 1000}
    (result,) = judge_route(alone, ETHERNET["net"], node="n1")
    assert result.state == "SKIP"


@pytest.mark.parametrize(("address", "owner"), [("10.0.0.5", "eth0"), ("fd00::5", "eth0"), ("10.9.0.1", None)])
def test_an_address_belongs_to_the_interface_that_has_it(address: str, owner: str | None) -> None:
    addresses = {"lo": {"127.0.0.1", "::1"}, "eth0": {"10.0.0.5", "10.0.0.9", "fd00::5"}}
    assert find_owner(address, addresses) == owner


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this host has no IPv6")
def test_the_route_to_a_peer_that_has_only_ipv6_is_found() -> None:
    route = read_route("::1", NodeRoot.of(None))
    assert (route["interface"], route["source"], route["error"]) == ("lo", "::1", None)


def test_networks_of_this_machine_are_read() -> None:
    assert IPv4Interface("127.0.0.1/8") in read_networks()["lo"]
