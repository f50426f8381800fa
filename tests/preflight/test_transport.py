"""NCCL's own log: which network it took. Lines in the shape that NCCL writes, with names of our own."""

from __future__ import annotations

import random

import pytest

from janus_cluster.preflight.profile import load_profile
from janus_cluster.preflight.transport import judge_transport, parse_nccl_log
from janus_cluster.resources import templates_dir

IB = load_profile(templates_dir(), "h800-ib")["transport"]
ETHERNET = load_profile(templates_dir(), "h800-ethernet")["transport"]
PORTS = " ".join(f"[{i}]mlx5_{i}:1/IB" for i in range(8))
USING_IB = f"h800-01:4101:4203 [0] NCCL INFO NET/IB : Using {PORTS} [RO]; OOB ib0:198.18.0.17<0>"
USING_SOCKET = "h800-01:4101:4203 [0] NCCL INFO NET/Socket : Using [0]ib0:198.18.0.17<0>"
NETWORK_IB = "h800-01:4101:4203 [0] NCCL INFO Using network IB"
NETWORK_SOCKET = "h800-01:4101:4203 [0] NCCL INFO Using network Socket"
GDR = "h800-01:4101:4203 [3] NCCL INFO Channel 02/0 : 11[3] -> 2[2] [send] via NET/IB/3/GDRDMA"
NO_GDR = "h800-01:4101:4203 [3] NCCL INFO Channel 02/0 : 11[3] -> 2[2] [receive] via NET/IB/3"
SOCKET = "h800-01:4101:4203 [3] NCCL INFO Channel 00/0 : 1[0] -> 0[0] [send] via NET/Socket/0"
P2P = "h800-01:4101:4203 [3] NCCL INFO Channel 00/0 : 8[0] -> 15[7] via P2P/IPC"


def state(*lines: str, profile: dict[str, object] = IB, num_nodes: int = 2) -> str:
    (result,) = judge_transport(parse_nccl_log(lines), profile, node="n1", num_nodes=num_nodes)
    return result.state


def test_infiniband_with_gpudirect_passes() -> None:
    facts = parse_nccl_log([USING_IB, NETWORK_IB, GDR, GDR, P2P])
    assert facts["ports"] == {f"mlx5_{i}:1": "IB" for i in range(8)}
    assert (facts["networks"], facts["channels"]) == (["IB"], {"IB/GDRDMA": 2, "IB": 0, "Socket": 0})
    assert state(USING_IB, NETWORK_IB, GDR) == "PASS"


@pytest.mark.parametrize(
    "lines",
    [
        (USING_SOCKET, NETWORK_SOCKET),
        (USING_IB, GDR, SOCKET),
        (USING_IB, NETWORK_IB, NO_GDR),
        (USING_IB, NETWORK_IB),
        (USING_IB.replace("[1]mlx5_1:1/IB", "[1]mlx5_1:1/RoCE"), NETWORK_IB, GDR),
    ],
    ids=["sockets", "one channel over sockets", "no GPUDirect", "no channel", "RoCE among the rails"],
)
def test_everything_else_fails_where_infiniband_is_wanted(lines: tuple[str, ...]) -> None:
    assert state(*lines) == "FAIL"


@pytest.mark.parametrize(
    "end", ["/GDRDMA", "(4)/GDRDMA", "(12)/GDRDMA/Shared", "/GDRDMA(PCI)", "(4)/GDRDMA(PCI)/Shared"]
)
def test_gpudirect_is_seen_however_the_channel_is_shared(end: str) -> None:
    line = GDR.replace("/GDRDMA", end)
    assert parse_nccl_log([line])["channels"] == {"IB/GDRDMA": 1, "IB": 0, "Socket": 0}
    assert state(USING_IB, NETWORK_IB, GDR, line) == "PASS"


def test_a_channel_through_another_ranks_hca_is_not_taken_for_gpudirect() -> None:
    assert state(USING_IB, NETWORK_IB, GDR, GDR.replace("/3/GDRDMA", "/3(4)")) == "FAIL"


def test_the_plugins_of_infiniband_are_infiniband() -> None:
    line = GDR.replace("NET/IB/3", "NET/IBext_v8/3(4)")
    facts = parse_nccl_log([USING_IB, NETWORK_IB.replace("IB", "IBext_v8"), line])
    assert (facts["networks"], facts["channels"]["IB/GDRDMA"]) == (["IB"], 1)


def test_a_log_that_says_nothing_is_never_a_pass() -> None:
    assert state() == "ERROR"
    assert state(P2P) == "ERROR"
    assert state("", profile=ETHERNET) == "ERROR"
    assert judge_transport(None, IB, node="n1", num_nodes=2)[0].state == "ERROR"


def test_sockets_are_right_where_they_are_wanted() -> None:
    assert state(USING_SOCKET, NETWORK_SOCKET, SOCKET, profile=ETHERNET) == "PASS"
    assert state(USING_IB, NETWORK_IB, GDR, profile=ETHERNET) == "FAIL"


def test_one_node_and_gloo_are_skipped_with_a_reason() -> None:
    assert state(USING_IB, num_nodes=1) == "SKIP"
    assert judge_transport(None, {"wanted": None}, node="n1", num_nodes=2)[0].state == "SKIP"


def test_no_damage_turns_a_bad_log_into_a_pass() -> None:
    chance = random.Random(4)
    bad = "\n".join([USING_IB, NETWORK_IB, GDR, NO_GDR, SOCKET, USING_SOCKET, NETWORK_SOCKET])
    for _ in range(300):
        text = list(bad)
        for _ in range(chance.randrange(1, 4)):
            text[chance.randrange(len(text))] = chance.choice("\0ü[]/: \n")
        assert state(*"".join(text).split("\n")) != "PASS"
    lines = bad.split("\n")
    for cut in range(len(bad)):
        assert state(*bad[:cut].split("\n")) in ("ERROR", "FAIL", "PASS")
    chance.shuffle(lines)
    assert state(*lines) == "FAIL"
