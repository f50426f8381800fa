"""What the node's shell, limits and kernel settings do to NCCL: locked memory, interface names, IOMMU and ACS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from node_fixtures import h800_node

from janus_cluster.job.profiles import load_preflight_profile
from janus_cluster.preflight.environment import find_absent_interfaces
from janus_cluster.preflight.limits import judge_limits, render_bytes
from janus_cluster.preflight.pcie import judge_pcie_paths, parse_acs

LIMITS = load_preflight_profile("h800-ib")["limits"]
MIB, GIB = 2**20, 2**30


@pytest.mark.parametrize(
    ("memlock_bytes", "state", "shown"),
    [
        (64 * 1024, "FAIL", "64 KiB"),
        (8 * MIB, "FAIL", "8 MiB"),
        (256 * MIB - 1, "FAIL", "256 MiB"),
        (256 * MIB, "WARN", "256 MiB"),
        (31 * GIB, "WARN", "31 GiB"),
        (32 * GIB, "PASS", "32 GiB"),
        (None, "PASS", "unlimited"),
    ],
)
def test_locked_memory_that_cannot_hold_nccls_buffers_fails(memlock_bytes: int | None, state: str, shown: str) -> None:
    fact = {
        "memlock_bytes": memlock_bytes,
        "nofile": None,
        "shm": {"path": "/dev/shm", "total_bytes": None, "free_bytes": None},
        "memory_available_bytes": None,
    }
    (result,) = (r for r in judge_limits(fact, LIMITS, node="n1") if r.id == "limits.memlock")
    assert (result.state, result.measured, result.blames_node) == (state, shown, state != "FAIL")


def test_bytes_are_shown_in_a_unit_in_which_they_can_be_read() -> None:
    assert [render_bytes(n) for n in (0, 1536, 64 * 1024, 8 * MIB, GIB, 30 * GIB + GIB // 2)] == [
        "0 KiB", "1.5 KiB", "64 KiB", "8 MiB", "1 GiB", "30.5 GiB",
    ]  # fmt: skip


NET = ["docker0", "eth0", "ibp12s0", "lo"]


@pytest.mark.parametrize(
    ("variables", "absent"),
    [
        ({}, []),
        ({"NCCL_SOCKET_IFNAME": "=eth0", "GLOO_SOCKET_IFNAME": "eth0"}, []),
        ({"NCCL_SOCKET_IFNAME": "=bond9"}, ["NCCL_SOCKET_IFNAME=bond9"]),
        ({"NCCL_SOCKET_IFNAME": "ib0"}, ["NCCL_SOCKET_IFNAME"]),
        ({"NCCL_SOCKET_IFNAME": "ib"}, []),
        ({"NCCL_SOCKET_IFNAME": "=ib"}, ["NCCL_SOCKET_IFNAME"]),
        ({"NCCL_SOCKET_IFNAME": "bond9,eth"}, []),
        ({"NCCL_SOCKET_IFNAME": "^docker0,lo"}, []),
        ({"NCCL_SOCKET_IFNAME": "^docker,lo,eth,ib"}, ["NCCL_SOCKET_IFNAME"]),
        ({"GLOO_SOCKET_IFNAME": "bond9"}, ["GLOO_SOCKET_IFNAME"]),
        ({"GLOO_SOCKET_IFNAME": "=eth0"}, ["GLOO_SOCKET_IFNAME"]),
        ({"GLOO_SOCKET_IFNAME": "eth0,bond9"}, ["GLOO_SOCKET_IFNAME"]),
        ({"NCCL_SOCKET_IFNAME": "", "GLOO_SOCKET_IFNAME": ""}, []),
    ],
)
def test_an_interface_that_does_not_exist_is_found_in_each_form_of_the_list(
    variables: dict[str, str], absent: list[str]
) -> None:
    found = find_absent_interfaces(variables, NET)
    assert len(found) == len(absent)
    assert all(text.startswith(name.partition("=")[0]) for text, name in zip(found, absent, strict=True))


def test_the_nodes_own_interfaces_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = h800_node(tmp_path).write()
    net = node.root / "sys" / "class" / "net"
    (net / "bond0").mkdir(parents=True)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=bond9")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    result = node.judge()["environment"]
    assert (result.state, result.blames_node) == ("FAIL", False)
    assert "NCCL_SOCKET_IFNAME==bond9: no such interface here (bond0)" in result.measured
    (net / "bond9").mkdir()
    assert node.judge()["environment"].state != "FAIL"


def pcie(groups: dict[str, int], text: str, problem: str | None = None) -> dict[str, tuple[str, str]]:
    fact: dict[str, Any] = {"iommu_groups": groups, **parse_acs(text), "problem": problem}
    return {r.id: (r.state, r.measured) for r in judge_pcie_paths(fact, node="n1")}


OFF = "15:01.0 PCI bridge: X\n\t\tACSCtl:\tSrcValid- TransBlk- ReqRedir- CmpltRedir- UpstreamFwd-\n"
ON = OFF.replace("15:01", "0000:26:01").replace("ReqRedir-", "ReqRedir+")


@pytest.mark.parametrize(
    ("groups", "text", "iommu", "acs"),
    [
        ({}, OFF, "PASS", "PASS"),
        ({"identity": 90}, OFF, "PASS", "PASS"),
        ({"identity": 90, "DMA-FQ": 8}, OFF, "WARN", "PASS"),
        ({"DMA": 90}, OFF + ON, "WARN", "WARN"),
        ({}, "15:01.0 PCI bridge: X\n\tCapabilities: <access denied>\n", "PASS", "SKIP"),
        ({}, "", "PASS", "SKIP"),
    ],
)
def test_what_sends_gpudirect_through_the_cpu_is_a_warning(
    groups: dict[str, int], text: str, iommu: str, acs: str
) -> None:
    found = pcie(groups, text)
    assert (found["pcie.iommu"][0], found["pcie.acs"][0]) == (iommu, acs)
    assert acs != "WARN" or found["pcie.acs"][1] == "1 devices with ACS: 0000:26:01.0"


def test_the_groups_are_read_from_sysfs(tmp_path: Path) -> None:
    node = h800_node(tmp_path).write()
    for i, kind in enumerate(("identity", "DMA-FQ")):
        group = node.root / "sys" / "kernel" / "iommu_groups" / str(i)
        group.mkdir(parents=True)
        (group / "type").write_text(f"{kind}\n")
    result = node.judge()["pcie.iommu"]
    assert (result.state, result.measured) == ("WARN", "1 of type DMA-FQ, 1 of type identity")
    assert "iommu=pt" in result.fix
