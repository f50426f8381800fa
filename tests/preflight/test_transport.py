"""NCCL's own log: which network it took. Lines in the shape that NCCL writes, with names of our own."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from janus_cluster.job.profiles import load_preflight_profile
from janus_cluster.preflight.transport import judge_transport, parse_nccl_log
from tests.drawing import drawn

IB = load_preflight_profile("h800-ib")["transport"]
ROCE = load_preflight_profile("h800-roce")["transport"]
ETHERNET = load_preflight_profile("h800-ethernet")["transport"]
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


def test_a_log_without_information_is_never_a_pass() -> None:
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


MERGED = USING_IB.replace(
    PORTS, "[0]={[0] mlx5_2:1/RoCE, [1] mlx5_3:1/RoCE} [1]={[2] mlx5_0:1/RoCE, [3] mlx5_1:1/RoCE}"
)
STORAGE = USING_IB.replace(" [RO]", " [8]={[8] mlx5_8:1/RoCE, [9] mlx5_9:1/RoCE} [RO]")


def test_merged_ports_are_read_one_by_one() -> None:
    assert parse_nccl_log([MERGED])["ports"] == {f"mlx5_{i}:1": "RoCE" for i in range(4)}
    assert parse_nccl_log([STORAGE])["ports"]["mlx5_9:1"] == "RoCE"
    assert state(MERGED, NETWORK_IB, GDR) == "FAIL"
    assert state(STORAGE, NETWORK_IB, GDR) == "FAIL"
    merged_ib = MERGED.replace("RoCE", "IB")
    assert state(merged_ib, NETWORK_IB, GDR) == "PASS"


def test_roce_is_right_where_the_profile_wants_it() -> None:
    assert state(MERGED, NETWORK_IB, GDR, profile=ROCE) == "PASS"
    assert state(USING_IB, NETWORK_IB, GDR, profile=ROCE) == "FAIL"
    assert state(USING_SOCKET, NETWORK_SOCKET, SOCKET, profile=ROCE) == "FAIL"


@pytest.mark.parametrize(
    "lines",
    [
        (USING_IB.replace("[3]mlx5_3:1/IB", "[3]mlx5_3 1/IB").replace("[4]mlx5_4:1/IB", "?mlx5_4:1/IB"), GDR),
        (USING_IB.replace(PORTS, "[0]something new"), GDR),
        (USING_IB, GDR, GDR.replace("NET/IB/3/GDRDMA", "NET/Something/3")),
        (NETWORK_IB, GDR),
    ],
    ids=["a port in another form", "no port", "another channel", "no line of ports"],
)
def test_a_line_of_ports_or_channels_that_does_not_parse_is_an_error(lines: tuple[str, ...]) -> None:
    assert state(*lines) == "ERROR"


@pytest.mark.parametrize(
    "line", ["NET/IB : No device found.", "Error: network IB not found.", "Failed to initialize any NET plugin"]
)
def test_nccls_own_words_are_shown_where_it_finds_no_network(line: str) -> None:
    (result,) = judge_transport(parse_nccl_log([f"n1:1:1 [0] NCCL INFO {line}"]), IB, node="n1", num_nodes=2)
    assert result.state == "FAIL"
    assert result.measured in line


@drawn(150)
@given(lost=st.sets(st.integers(0, 5)), bad=st.sampled_from([STORAGE, MERGED, SOCKET, NO_GDR, USING_SOCKET]))
def test_lost_lines_never_turn_a_bad_log_into_a_pass(lost: set[int], bad: str) -> None:
    lines = [USING_IB, NETWORK_IB, GDR, P2P, GDR, "\0"]
    assert state(*(line for i, line in enumerate(lines) if i not in lost), bad) != "PASS"


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
