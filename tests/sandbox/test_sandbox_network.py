from __future__ import annotations

import ipaddress
import socket

import pytest

from janus_cluster.errors import SandboxFailed, UsageError
from janus_cluster.sandbox.faults import parse_rate, render_links, render_shaper
from janus_cluster.sandbox.layout import Layout
from janus_cluster.sandbox.network import (
    NetworkPlan,
    namespace_names,
    parse_routes,
    pick_subnet,
    render_fabric,
    render_node,
    render_outside,
)
from janus_cluster.sandbox.ports import pick_ports
from janus_cluster.sandbox.state import Fault

SUBNET = ipaddress.IPv4Network("198.18.7.0/24")
PLAN = NetworkPlan("a1b2c3", SUBNET, 2)


def test_tags_differ_between_folders_and_stay_for_one(tmp_path_factory: pytest.TempPathFactory) -> None:
    one, two = tmp_path_factory.mktemp("a"), tmp_path_factory.mktemp("a")
    assert Layout(one).tag == Layout(one).tag != Layout(two).tag


def test_every_interface_name_fits_the_kernels_15_characters() -> None:
    words = (render_outside(PLAN) + render_fabric(PLAN) + render_node(PLAN, 0)).split()
    names = {words[i + 1] for i, word in enumerate(words[:-1]) if word in ("dev", "name", "master")}
    assert {"ib0", "ib7", "rail7", "host0", "jca1b2c3h"} <= names
    assert max(len(name) for name in names) <= 15


def test_each_rail_has_a_subnet_of_its_own_and_each_node_an_address_in_it() -> None:
    nodes = PLAN.nodes(["/m1", "/m2"])
    for rail in range(8):
        subnet = ipaddress.ip_network(f"198.18.7.{16 * rail}/28")
        one, two = (ipaddress.ip_address(n.rails[f"ib{rail}"]) for n in nodes)
        assert one in subnet and two in subnet and one != two
    network = PLAN.network()
    assert len({network.controller_address, network.host_address, nodes[0].address, nodes[1].address}) == 4


@pytest.mark.parametrize("number", [1, 2, 8])
def test_the_plans_namespaces_are_among_those_that_down_looks_for(number: int) -> None:
    plan = NetworkPlan("a1b2c3", SUBNET, number)
    planned = {plan.controller_namespace, *(str(node.namespace) for node in plan.nodes(["/m"] * number))}
    assert len(planned) == number + 1
    assert planned <= set(namespace_names(plan.tag))


def test_eight_nodes_the_controller_and_this_machine_have_an_address_each_on_rail_0() -> None:
    plan = NetworkPlan("a1b2c3", SUBNET, 8)
    network, nodes = plan.network(), plan.nodes(["/m"] * 8)
    addresses = {network.controller_address, network.host_address, *(node.address for node in nodes)}
    assert len(addresses) == 10
    assert all(ipaddress.ip_address(address) in ipaddress.ip_network("198.18.7.0/28") for address in addresses)


def test_subnet_of_another_route_is_passed_over_and_the_default_route_is_not_in_the_way() -> None:
    first = pick_subnet("000000", [])
    second = pick_subnet("000000", [first, ipaddress.IPv4Network("0.0.0.0/1")])
    assert (str(first), str(second)) == ("198.18.0.0/24", "198.18.1.0/24")


def test_no_free_subnet_is_an_error_that_names_plain_mode() -> None:
    taken = list(ipaddress.IPv4Network("198.18.0.0/15").subnets(new_prefix=16))
    with pytest.raises(SandboxFailed) as caught:
        pick_subnet("000000", taken)
    assert "plain" in str(caught.value.hint)


def test_routes_are_read_from_ip_json() -> None:
    text = '[{"dst":"default","gateway":"192.0.2.1"},{"dst":"192.0.2.0/24"},{"type":"local","dst":"192.0.2.2"}]'
    assert [str(n) for n in parse_routes(text)] == ["192.0.2.0/24", "192.0.2.2/32"]
    assert parse_routes("") == []


@pytest.mark.parametrize(("rate", "bits"), [("8kbit", 8_000), ("400mbit", 400_000_000), ("2.5gbit", 2_500_000_000)])
def test_rates_are_read_as_tc_reads_them(rate: str, bits: int) -> None:
    assert parse_rate(rate) == bits


@pytest.mark.parametrize("rate", ["", "400", "7.9kbit", "401gbit", "1mbit; reboot", "-1mbit", "1Mbit", "1mbit\n"])
def test_a_rate_that_tc_would_misread_is_refused(rate: str) -> None:
    with pytest.raises(UsageError, match="rate"):
        parse_rate(rate)


def test_the_bucket_grows_with_the_rate() -> None:
    assert "burst 32000b" in render_shaper("ib0", "8mbit")
    assert "burst 12500000b" in render_shaper("ib0", "10gbit")
    assert render_shaper("ib0", None).endswith("noqueue")


def test_links_follow_from_the_faults_in_force() -> None:
    faults = [
        Fault("slow-link", "h800-02", {"rail": "all", "rate": "1gbit"}),
        Fault("slow-link", "h800-02", {"rail": "ib3", "rate": "2gbit"}),
        Fault("cut-link", "h800-02", {"rail": "ib7"}),
        Fault("cut-link", "h800-01", {"rail": "all"}),
    ]
    lines = render_links(faults, "h800-02", index=1)
    links = lines["links"].splitlines()
    assert links == [*(f"link set n2r{r} up" for r in range(7)), "link set n2r7 down"]
    assert [line.split()[7] for line in lines["away"].splitlines()] == ["1gbit"] * 3 + ["2gbit"] + ["1gbit"] * 4
    assert set(render_links([], "h800-01", index=0)["towards"].split()) >= {"n1r0", "noqueue"}


def test_ports_in_use_are_passed_over() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
    first = pick_ports(3, seed="abcdef")
    with socket.socket() as s:
        s.bind(("127.0.0.1", first[1]))
        s.listen()
        second = pick_ports(3, seed="abcdef")
    assert first[1] not in second and len(set(second)) == 3
