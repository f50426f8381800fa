"""Nodes against each other: agreement, links, the master port, clocks; and the exchange itself over real sockets."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import pytest

from janus_cluster.node.connect import _connect_until, call, exchange, listen
from janus_cluster.node.port import find_free_port
from janus_cluster.preflight.cross_node import (
    describe_loopback,
    judge_agreement,
    judge_clocks,
    judge_connections,
    judge_cross_node,
)
from janus_cluster.preflight.interfaces import find_rails, judge_links, plan_rails, read_interfaces
from janus_cluster.preflight.versions import judge_same_versions

pytestmark = pytest.mark.slow

NODES = ("n1", "n2")


def interface(name: str, network: int, host: int, *, carrier: bool = True) -> dict[str, Any]:
    address = {"address": f"198.18.{network}.{host}", "network": f"198.18.{network}.0/24"}
    return {"name": name, "carrier": carrier, "speed_mb_per_s": 10000} | address


def rails_of(host: int, count: int = 3) -> list[dict[str, Any]]:
    return [interface(f"ib{i}", i, host) for i in range(count)]


def test_shared_networks_are_rails() -> None:
    found = plan_rails({"n1": rails_of(1), "n2": rails_of(2)})
    assert [rail["name"] for rail in found] == ["ib0", "ib1", "ib2"]
    assert found[1]["interfaces"] == {"n1": "ib1", "n2": "ib1"}


def test_a_rail_may_be_called_otherwise_on_the_other_node() -> None:
    found = find_rails({"n1": rails_of(1, 1), "n2": [interface("ens1", 0, 2)]})
    assert [(r["name"], r["interfaces"]["n2"]["name"]) for r in found] == [("ib0", "ens1")]


def test_the_same_address_on_both_nodes_is_no_rail() -> None:
    assert find_rails({"n1": rails_of(1), "n2": rails_of(1)}) == []
    assert find_rails({"n1": rails_of(1)}) == []
    assert find_rails({"n1": rails_of(1), "n2": []}) == []


def test_eight_interfaces_in_one_network_are_matched_by_name() -> None:
    both = {n: [interface(f"ib{i}", 0, 10 * h + i) for i in range(8)] for h, n in enumerate(NODES, 1)}
    assert [r["interfaces"]["n2"]["name"] for r in find_rails(both)] == [f"ib{i}" for i in range(8)]


def test_a_cut_link_is_of_the_node_that_has_no_carrier() -> None:
    cut = [*rails_of(2, 2), interface("ib2", 2, 2, carrier=False)]
    facts = {"n1": {"interfaces": rails_of(1)}, "n2": {"interfaces": cut}}
    judged = judge_links(find_rails({n: f["interfaces"] for n, f in facts.items()}), NODES)
    assert [(r.node, r.state) for r in judged] == [("n1", "PASS"), ("n2", "FAIL")]
    assert judged[1].measured == "no carrier on ib2"
    assert [r["name"] for r in plan_rails({n: f["interfaces"] for n, f in facts.items()})] == ["ib0", "ib1"]


def test_interfaces_of_this_machine_are_read() -> None:
    for found in read_interfaces():
        assert found["name"] != "lo"
        assert socket.inet_aton(found["address"])


def tables(**second: Any) -> dict[str, dict[str, dict[str, Any]]]:
    table = {"files": {"m.hash": "a", "m.mtime": 1, "m.bytes": 5}, "gpus": {"gpu0": "H800"}, "versions": {"torch": "2"}}
    return {"n1": table, "n2": {**table, **second}}


def test_of_three_nodes_who_lacks_a_network_of_the_others_is_named() -> None:
    facts = {"n1": rails_of(1, 2), "n2": rails_of(2), "n3": rails_of(3), "n4": rails_of(4)}
    rails = find_rails(facts)
    assert [rail["name"] for rail in rails] == ["ib0", "ib1", "ib2"]
    judged = {r.node: r for r in judge_links(rails, list(facts))}
    assert {node: r.state for node, r in judged.items()} == {"n1": "FAIL", "n2": "PASS", "n3": "PASS", "n4": "PASS"}
    assert "ib2" in judged["n1"].measured
    assert [rail["name"] for rail in plan_rails(facts)] == ["ib0", "ib1"], "what one node lacks is not tested"
    own = {"n1": rails_of(1, 2), "n2": rails_of(2, 2), "n3": rails_of(3), "n4": rails_of(4, 2)}
    assert [rail["name"] for rail in find_rails(own)] == ["ib0", "ib1"], "a network of one node alone is no rail"


@pytest.mark.parametrize("odd", ["n1", "n2", "n3"])
def test_of_three_nodes_the_odd_one_is_blamed_also_where_it_is_the_first(odd: str) -> None:
    tables = {n: {"driver": {"driver": "550" if n == odd else "570"}} for n in ("n1", "n2", "n3")}
    (found,) = judge_agreement(tables)
    assert (found.id, found.node, found.state) == ("same.driver", odd, "FAIL")
    assert "550" in found.measured and "570" in found.measured
    versions = {n: {"torch": "2.8" if n == odd else "2.9"} for n in ("n1", "n2", "n3")}
    assert {r.node for r in judge_same_versions(versions) if r.state == "FAIL"} == {odd}


def test_without_a_majority_no_node_is_the_odd_one() -> None:
    tables = {n: {"driver": {"driver": v}} for n, v in (("n1", "1"), ("n2", "1"), ("n3", "2"), ("n4", "2"))}
    (found,) = judge_agreement(tables)
    assert (found.node, found.state) == ("n1,n2,n3,n4", "FAIL")


def test_copies_of_other_times_hide_no_file_that_differs() -> None:
    tables = {
        n: {"files": {"m.mtime": k, "m.hash": "x" if n == "n3" else "y"}} for k, n in enumerate(("n1", "n2", "n3"))
    }
    (found,) = judge_agreement(tables)
    assert (found.node, found.state) == ("n3", "FAIL")


def test_a_connection_that_fails_is_of_the_far_node_where_node_0_was_reached_by_others() -> None:
    peers = [{"node": n, "back": f"{n}:1", "error": "timed out" if n == "n3" else None} for n in ("n2", "n3", "n4")]
    reports: dict[str, Any] = {"n1": {"error": None, "peers": peers}}
    reports |= {n: {"error": None, "clock_offset_s": 0.0} for n in ("n2", "n3", "n4")}
    found = judge_connections(reports, address="a", port=1, clock_warn_s=30)
    assert [(r.node, r.state) for r in found if r.id == "master_port"] == [
        ("n1,n2", "PASS"),
        ("n3", "FAIL"),
        ("n1,n4", "PASS"),
    ]
    alone = {"error": None, "peers": [p | {"error": "timed out"} for p in peers]}
    found = judge_connections(reports | {"n1": alone}, address="a", port=1, clock_warn_s=30)
    assert [r.node for r in found if r.state == "FAIL"] == ["n1,n2", "n1,n3", "n1,n4"]


def test_peers_that_cannot_be_reached_back_do_not_keep_the_others_waiting() -> None:
    """An address that answers nothing takes 5 s: one after the other, four of them would take longer than the limit."""
    port, token, found = find_free_port(seed=7), "run/1", []
    listener = threading.Thread(target=lambda: found.extend(listen(port, num_peers=5, token=token, limit_s=15)))
    listener.start()
    silent = [socket.create_server(("127.0.0.1", 0), backlog=0) for _ in range(4)]
    full = [socket.create_connection(server.getsockname()) for server in silent]
    connections = []
    for k, server in enumerate(silent):
        connections.append(_hello(port, token, f"deaf{k}", server.getsockname()[1]))
    assert "clock_offset_s" in call("127.0.0.1", port, node="n9", token=token)
    listener.join(30)
    assert not listener.is_alive()
    assert {peer["node"] for peer in found} == {"n9", *(f"deaf{k}" for k in range(4))}
    for s in (*silent, *full, *connections):
        s.close()


def _hello(port: int, token: str, node: str, back: int) -> socket.socket:
    """A peer of that name has called, and is to be reached back at port `back`."""
    connection = _connect_until("127.0.0.1", port, time.monotonic() + 30)
    connection.sendall(json.dumps({"token": token, "node": node, "port": back}).encode() + b"\n")
    return connection


@pytest.mark.parametrize(("address", "back"), [("127.0.0.1", "127.0.0.1:"), ("::1", "[::1]:")])
def test_the_master_port_is_reached_by_ipv4_and_by_ipv6_and_back(address: str, back: str) -> None:
    if ":" in address and not socket.has_dualstack_ipv6():
        pytest.skip("this host has no IPv6")
    port, token, found = find_free_port(seed=11), "run/1", []
    listener = threading.Thread(target=lambda: found.extend(listen(port, num_peers=1, token=token)))
    listener.start()
    assert "clock_offset_s" in call(address, port, node="n2", token=token)
    listener.join(30)
    (peer,) = found
    assert (peer["node"], peer["error"]) == ("n2", None) and peer["back"].startswith(back)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_port_that_one_address_of_this_host_has_taken_is_not_free(address: str) -> None:
    if ":" in address and not socket.has_dualstack_ipv6():
        pytest.skip("this host has no IPv6")
    port = find_free_port(seed=13)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, port), family=family):
        assert find_free_port(seed=13) != port


def test_agreement_shows_who_differs_in_what() -> None:
    assert {r.id: r.state for r in judge_agreement(tables())} == {"same.files": "PASS", "same.gpus": "PASS"}
    (files, gpus) = judge_agreement(tables(gpus={}))
    assert (files.state, gpus.state, gpus.node) == ("PASS", "FAIL", "n1,n2")
    assert gpus.measured == "gpu0: n1 H800, n2 nothing"
    extra = judge_agreement(tables(gpus={"gpu0": "H800", "gpu1": "H800"}))[1]
    assert extra.measured == "gpu1: n1 nothing, n2 H800"


def test_a_node_that_gave_no_answer_differs_in_nothing_and_agrees_in_nothing() -> None:
    """A hung nvidia-smi is no other driver: the pair is not judged, and the node's own check has the reason."""
    (result,) = (r for r in judge_agreement(tables(gpus=None)) if r.id == "same.gpus")
    assert (result.state, result.measured) == ("SKIP", "nothing to compare: n2 gave no answer (gpu.count)")


def test_files_that_differ_only_in_time_are_a_warning() -> None:
    assert judge_agreement(tables(files={"m.hash": "a", "m.mtime": 2, "m.bytes": 5}))[0].state == "WARN"
    assert judge_agreement(tables(files={"m.hash": "b", "m.mtime": 2, "m.bytes": 5}))[0].state == "FAIL"
    assert judge_agreement(tables(files={}))[0].state == "PASS", "a missing path is its node's own fault"


def test_nothing_is_compared_when_a_node_is_absent() -> None:
    facts = {"agreement": tables()["n1"], "interfaces": rails_of(1)}
    assert judge_cross_node({"n1": facts, "n2": None}) == []
    assert judge_cross_node({"n1": facts}) == []


@pytest.mark.parametrize(("offset_s", "state"), [(30.0, "PASS"), (30.1, "WARN"), (-30.1, "WARN"), (-29.0, "PASS")])
def test_the_clock_spread_is_judged(offset_s: float, state: str) -> None:
    assert judge_clocks({"n2": offset_s}, NODES, warn_above_s=30)[0].state == state
    assert judge_clocks({}, NODES, warn_above_s=30) == []


def reports(**second: Any) -> dict[str, dict[str, Any] | None]:
    accepted = {"node": "n2", "back": "198.18.0.2:4", "error": None}
    return {
        "n1": {"error": None, "peers": [accepted], "loopback_gb_per_s": 2.0},
        "n2": {"error": None, "clock_offset_s": 0.1, "loopback_gb_per_s": 3.0} | second,
    }


def connection(found: dict[str, dict[str, Any] | None]) -> tuple[str, str, str]:
    judged = judge_connections(found, address="n1", port=15000, clock_warn_s=30)
    (result,) = [r for r in judged if r.id == "master_port"]
    return result.state, result.measured, result.node


def test_the_master_port_fails_with_address_and_port_and_blames_the_pair() -> None:
    assert connection(reports()) == ("PASS", "both ways", "n1,n2")
    assert connection(reports(error="No route to host")) == ("FAIL", "n2 to n1:15000: No route to host", "n1,n2")
    busy = reports()
    busy["n1"] = {"error": "Address already in use"}
    assert connection(busy)[:2] == ("FAIL", "listening on n1:15000: Address already in use")
    back = reports()
    back["n1"] = {"error": None, "peers": [{"node": "n2", "back": "198.18.0.2:4", "error": "timed out"}]}
    assert connection(back)[:2] == ("FAIL", "back to n2 at 198.18.0.2:4: timed out")
    stranger = reports()
    stranger["n1"] = {"error": None, "peers": []}
    assert connection(stranger)[0] == "FAIL"
    assert connection(reports() | {"n2": None})[:2] == ("FAIL", "n2 did not report on n1:15000")
    assert describe_loopback(reports()) == "loopback within the hosts: n1 2 GB/s, n2 3 GB/s"


def test_the_exchange_goes_both_ways_and_measures_the_clock() -> None:
    port = find_free_port(seed=71)
    found: list[Any] = []
    listener = threading.Thread(target=lambda: found.extend(listen(port, num_peers=1, token="t", limit_s=10)))
    listener.start()
    # A stranger is not taken for a node.
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
                stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
            break
        except ConnectionRefusedError:
            continue
    report = call("127.0.0.1", port, node="n2", token="t", limit_s=10)
    listener.join()
    assert abs(report["clock_offset_s"]) < 1
    assert [(p["node"], p["error"]) for p in found] == [("n2", None)]


def test_a_port_where_none_or_another_program_answers_is_reported() -> None:
    port = find_free_port(seed=72)
    with pytest.raises(OSError, match="refused"):
        call("127.0.0.1", port, node="n2", token="t", limit_s=0.3)
    with socket.create_server(("", port)):
        report = exchange(node="n1", node_rank=0, num_nodes=2, address="127.0.0.1", port=port, token="t")
    assert "in use" in report["error"]


def test_peers_that_never_come_are_missing() -> None:
    assert listen(find_free_port(seed=73), num_peers=1, token="t", limit_s=0.2) == []
