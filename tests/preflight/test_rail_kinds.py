"""Which ports are rails, which are storage, foreign or virtual, and what is another kind of site and not broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from node_fixtures import NUM, FakeNode, FakePort, h800_node, sound_ports

from janus_cluster.job.profiles import load_preflight_profile
from janus_cluster.preflight.agreement import collect_agreement
from janus_cluster.preflight.cross_node import judge_agreement
from janus_cluster.preflight.gate import build_verdict
from janus_cluster.preflight.hca import parse_nccl_list, rails, usable_rails
from janus_cluster.preflight.hca_judge import judge_hcas, judge_pcie, judge_ports
from janus_cluster.preflight.ibstat import parse_ibstat
from janus_cluster.preflight.network_env import derive_network_env
from janus_cluster.preflight.static import blame_the_odd, judge_static
from janus_cluster.run.records.verdict import CheckResult, Verdict
from tests.drawing import drawn

IB, ROCE = (load_preflight_profile(name)["hca"] for name in ("h800-ib", "h800-roce"))


def port(device: str, rate: int = 400, *, up: bool = True, **changes: Any) -> dict[str, Any]:
    state = (
        {"state": "4: ACTIVE", "phys_state": "5: LinkUp"} if up else {"state": "1: DOWN", "phys_state": "2: Polling"}
    )
    return {
        "device": device, "port": "1", **state, "rate": f"{rate if up else 10} Gb/sec (4X NDR)",
        "link_layer": "InfiniBand", "ca_type": "MT4129", "firmware": "28.39.3004", **changes,
    }  # fmt: skip


def many(num: int, rate: int = 400, **changes: Any) -> list[dict[str, Any]]:
    return [port(f"mlx5_{i}", rate, **changes) for i in range(num)]


def judge(ports: list[dict[str, Any]], value: str | None = None, profile: dict[str, Any] = IB) -> tuple[str, str, bool]:
    found = judge_ports(ports, profile, chosen=parse_nccl_list(value))
    return found.state, found.fix, found.blames_node


def hca_results(node: FakeNode) -> dict[str, CheckResult]:
    return {check: r for check, r in node.write().judge().items() if check.startswith("hca.")}


def hca_faults(node: FakeNode) -> dict[str, str]:
    return {check: r.state for check, r in hca_results(node).items() if r.state not in ("PASS", "SKIP")}


SET = "--set preflight.thresholds.hca"
STORAGE = [port("mlx5_8", up=False), port("mlx5_9", 200)]


@pytest.mark.parametrize(
    ("ports", "state"),
    [
        (many(8), "PASS"),
        ([*many(8), *STORAGE], "WARN"),
        ([*many(8), port("mlx5_8")], "WARN"),
        ([*many(7), port("mlx5_7", up=False)], "FAIL"),
        ([*many(7), port("mlx5_7", 200)], "FAIL"),
        (many(7), "FAIL"),
        ([*many(7), *STORAGE], "FAIL"),
        (many(5), "FAIL"),
        (many(1), "FAIL"),
        ([], "FAIL"),
        # Another kind of site: all alike.
        (many(8, 200), "WARN"),
        (many(8, 100), "WARN"),
        (many(4), "WARN"),
        (many(4, 200), "WARN"),
        (many(2, 200), "WARN"),
        ([*many(8, 200), port("mlx5_8", up=False)], "WARN"),
        # Alike, and too slow for any site.
        (many(8, 10), "FAIL"),
        (many(8, up=False), "FAIL"),
        ([*many(4), *(port(f"mlx5_{i}", up=False) for i in range(4, 8))], "FAIL"),
        ([*many(4, 200), *(port(f"mlx5_{i}") for i in range(4, 8))], "FAIL"),
    ],
)
def test_enough_sound_rails_pass_and_a_missing_one_fails(ports: list[dict[str, Any]], state: str) -> None:
    found, _, blames_node = judge(ports)
    assert (found, blames_node) == (state, True)


def test_a_port_beside_a_gpu_is_a_rail_however_many_others_are_sound() -> None:
    beside = [port(f"mlx5_{i}", near_gpu=True) for i in range(7)]
    broken = port("mlx5_7", up=False, near_gpu=True)
    assert judge([*beside, port("mlx5_8"), port("mlx5_9"), broken])[0] == "FAIL"
    assert judge([*beside, port("mlx5_7", near_gpu=True), port("mlx5_8", up=False)])[0] == "WARN"
    assert judge([*many(8, 200, near_gpu=True), port("mlx5_8", up=False, near_gpu=True)])[0] == "FAIL"


def test_the_kernels_tree_shows_which_hca_is_beside_a_gpu(tmp_path: Path) -> None:
    node = h800_node(tmp_path).write()
    sys = node.root / "sys"
    tree = {
        "mlx5_0": "pci0000:15/0000:15:01.0/0000:16:00.0/0000:18:00.0",
        "mlx5_1": "pci0000:26/0000:26:01.0/0000:27:00.0",
    }
    gpu = sys / "devices" / "pci0000:15/0000:15:01.0/0000:16:02.0/0000:1b:00.0"
    for device, path in tree.items():
        folder = sys / "devices" / path
        folder.parent.mkdir(parents=True)
        (sys / "class" / "infiniband" / device / "device").rename(folder)
        (sys / "class" / "infiniband" / device / "device").symlink_to(folder)
    gpu.mkdir(parents=True)
    (sys / "bus" / "pci" / "drivers" / "nvidia").mkdir(parents=True)
    (sys / "bus" / "pci" / "drivers" / "nvidia" / "0000:1b:00.0").symlink_to(gpu)
    ports = {p["device"]: p for p in node.facts(node.resolve())["hca"]["ports"]}
    assert [ports[f"mlx5_{i}"]["near_gpu"] for i in range(3)] == [True, False, False]
    assert ports["mlx5_0"]["pcie_speed"] == "32.0 GT/s PCIe"


@pytest.mark.parametrize(
    "value",
    ["=" + ",".join(f"mlx5_{i}:1" for i in range(8)), "=" + ",".join(f"mlx5_{i}" for i in range(8)),
     "^=mlx5_8,mlx5_9", "^=mlx5_8:1,mlx5_9:1", "^mlx5_8,mlx5_9"],
)  # fmt: skip
def test_storage_that_nccls_list_leaves_out_is_no_rail(value: str) -> None:
    for storage in (STORAGE, [port("mlx5_8"), port("mlx5_9")]):
        assert judge([*many(8), *storage], value)[0] == "PASS"
        assert judge([*many(7), port("mlx5_7", up=False), *storage], value)[0] == "FAIL"


def test_a_prefix_takes_what_begins_so() -> None:
    ports = [*(port(f"ib_{i}") for i in range(8)), *(port(f"stor_{i}") for i in range(8))]
    assert judge(ports, "ib")[0] == "PASS"
    assert judge(ports, "^stor")[0] == "PASS"
    state, fix, blames_node = judge(ports, "mlx5")
    assert (state, blames_node, "leave NCCL_IB_HCA unset" in fix) == ("FAIL", False, True)
    assert judge(many(8), "mlx5")[0] == "PASS"


def test_an_exact_list_is_judged_port_by_port() -> None:
    names = ",".join(f"mlx5_{i}" for i in range(7))
    assert judge([*many(8)], f"={names},mlx5_9")[0] == "FAIL"
    found = judge_ports(many(8), IB, chosen=parse_nccl_list(f"={names},mlx5_9"))
    assert "mlx5_9, which this node does not have" in found.measured
    assert judge([*many(8), port("mlx5_8", up=False)], f"={names},mlx5_7,mlx5_8")[0] == "FAIL"


@pytest.mark.parametrize(
    ("ports", "options"),
    [
        (many(4), "--set preflight.thresholds.hca.ports_min=4"),
        (many(8, 200), "--set preflight.thresholds.hca.rate_gb_per_s_min=200"),
        (
            many(4, 200),
            "--set preflight.thresholds.hca.ports_min=4 --set preflight.thresholds.hca.rate_gb_per_s_min=200",
        ),
    ],
)
def test_another_kind_of_site_is_adopted_by_the_line_that_is_printed(ports: list[dict[str, Any]], options: str) -> None:
    state, fix, _ = judge(ports)
    assert (state, fix) == ("WARN", f"if all nodes are so: {options}")
    changes = dict(option.removeprefix("preflight.thresholds.hca.").split("=") for option in options.split()[1::2])
    adopted = IB | {key: float(value) for key, value in changes.items()}
    assert judge(ports, profile=adopted)[0] == "PASS"
    assert judge(ports[1:], profile=adopted)[0] in ("FAIL", "WARN")


def bonds(num: int = 8, rate: int = 200, **changes: Any) -> list[dict[str, Any]]:
    return [port(f"mlx5_bond_{i}", rate, link_layer="Ethernet", **changes) for i in range(num)]


def test_roce_is_no_infiniband_and_no_fault_of_one_node() -> None:
    state, fix, blames_node = judge(bonds())
    assert (state, blames_node, "environment.profile=h800-roce" in fix) == ("FAIL", False, True)
    assert judge([*bonds(), port("mlx5_0")])[2] is False
    assert judge([*many(7), *bonds(2)])[2] is True


def test_the_profile_for_roce_takes_bonds_and_finds_a_missing_one() -> None:
    management = port("mlx5_0", 25, link_layer="Ethernet", ca_type="MT4117")
    assert judge([*bonds(), management], profile=ROCE)[0] == "PASS"
    assert judge([*bonds(7), management], profile=ROCE)[0] == "FAIL"
    assert judge([*bonds(7), port("mlx5_bond_7", up=False, link_layer="Ethernet")], profile=ROCE)[0] == "FAIL"
    assert judge(many(8), profile=ROCE)[0] == "FAIL"
    env = derive_network_env({"hca": {"ports": [*bonds(), management]}}, load_preflight_profile("h800-roce"), {})
    assert [v.value for v in env if v.name == "NCCL_IB_HCA"] == ["=" + ",".join(f"mlx5_bond_{i}:1" for i in range(8))]


def verdict_of(*nodes: FakeNode) -> Verdict:
    resolved = nodes[0].resolve()
    results = judge_static({node.name: node.facts(resolved) for node in nodes}, resolved)
    names = tuple(node.name for node in nodes)
    return build_verdict(results, resolved, nodes=names, job_id=None, now=0)


def test_what_the_whole_site_has_excludes_no_node_and_what_one_node_has_does(tmp_path: Path) -> None:
    roce = [FakePort(f"mlx5_bond_{i}", rate=200, layer="Ethernet") for i in range(NUM)]
    both = [h800_node(tmp_path / name, name=name, ports=roce) for name in ("n1", "n2")]
    for node in both:
        node.sets = ()
    first, second = (node.write() for node in both)
    first.sets = (f"preflight.sysfs_root={first.root}",)
    alike = verdict_of(first, second)
    assert [r.state for r in alike.results if r.id == "site.kind"] == ["FAIL", "FAIL"]
    assert alike.exclude == ()
    odd = [r for r in alike.results if r.node == "n1"]
    sound = [r for r in h800_node(tmp_path / "n3", name="n3").write().judge().values() if r.id == "site.kind"]
    mixed = blame_the_odd([*odd, *sound])
    assert [(r.node, r.blames_node) for r in mixed if r.id == "site.kind"] == [("n1", True), ("n3", True)]


def test_virtual_functions_are_no_rails() -> None:
    virtual = [port(f"mlx5_{i}", is_virtual=True) for i in range(8, 24)]
    by_type = [port(f"mlx5_{i}", ca_type="MT4126") for i in range(8, 24)]
    for others in (virtual, by_type):
        assert [p["device"] for p in rails({"ports": [*many(8), *others]})] == [f"mlx5_{i}" for i in range(8)]
        assert judge([*many(7), *others])[0] == "FAIL"
    # A virtual machine has nothing else, and no link to the physical function.
    assert len(rails({"ports": by_type[:8]})) == 8
    assert rails({"ports": virtual}) == []


def test_the_kernels_sign_of_a_virtual_function_is_read(tmp_path: Path) -> None:
    functions = [FakePort(f"mlx5_{i}", is_virtual=True) for i in range(9, 17)]
    assert hca_faults(h800_node(tmp_path / "a", ports=[*sound_ports(), *functions])) == {}
    node = h800_node(tmp_path / "b", ports=[*sound_ports()[1:], *functions])
    assert hca_results(node)["hca.rails"].state == "FAIL"


def test_nccl_gets_the_rails_without_slower_storage() -> None:
    found = usable_rails({"ports": [*many(8), *STORAGE]}, IB)
    assert [p["device"] for p in found] == [f"mlx5_{i}" for i in range(8)]
    assert len(usable_rails({"ports": many(8, 200)}, IB)) == 8


@pytest.mark.parametrize(
    ("changes", "state", "word"),
    [
        ({"speed": "2.5 GT/s PCIe"}, "FAIL", "mlx5_2:1 x16 at 2.5 GT/s PCIe (of x16, 32 GT/s)"),
        ({"speed": "16.0 GT/s PCIe"}, "FAIL", "mlx5_2:1"),
        ({"speed": "8 GT/s"}, "FAIL", "mlx5_2:1"),
        ({"width": "8"}, "FAIL", "mlx5_2:1 x8"),
        # An adapter of PCIe 4 in a slot of PCIe 5 has its own highest speed.
        ({"speed": "16.0 GT/s PCIe", "speed_max": "16.0 GT/s PCIe"}, "PASS", "8 rails"),
        ({"speed": "16.0 GT/s PCIe", "speed_max": None}, "FAIL", "mlx5_2:1"),
        ({"speed": "Unknown"}, "WARN", "Unknown"),
        ({"width": "0"}, "WARN", "x0"),
        ({"width": "63"}, "WARN", "x63"),
    ],
)
def test_the_speed_of_a_slot_is_judged_like_its_width(
    tmp_path: Path, changes: dict[str, Any], state: str, word: str
) -> None:
    ports = sound_ports()
    ports[2] = FakePort("mlx5_2", **changes)
    result = hca_results(h800_node(tmp_path, ports=ports))["hca.pcie_width"]
    assert (result.state, word in result.measured) == (state, True), result.measured


@pytest.mark.parametrize(
    ("width", "speed", "state"),
    [("16", "16.0 GT/s", "WARN"), ("8", "32.0 GT/s", "WARN"), ("16", "2.5 GT/s", "FAIL"), ("4", "32.0 GT/s", "FAIL")],
)
def test_the_same_half_for_all_rails_is_the_machines_kind(width: str, speed: str, state: str) -> None:
    found = many(8, pcie_width=width, pcie_speed=speed, pcie_speed_max="32.0 GT/s")
    result = judge_pcie(found, IB, "n1")
    assert result.state == state
    assert ("--set preflight.thresholds.hca.pcie_gt_per_s_min=" in result.fix) == (state == "WARN")


def test_an_ibstat_of_a_newer_rdma_core_has_more_keys() -> None:
    text = "".join(p.ibstat() for p in sound_ports())
    newer = text.replace("\t\tBase lid: 7", "\t\tEffective speed: 400\n\t\tBase lid: 7").replace(
        "\tNumber of ports", "\tSome new key:\n\tlower key: 3\n\tNumber of ports"
    )
    assert parse_ibstat(newer)["damaged"] == []
    assert parse_ibstat(newer)["ports"] == parse_ibstat(text)["ports"]


@pytest.mark.parametrize("kind", ["iWARP RNIC", "usNIC UDP", "Unspecified", "Switch"])
def test_a_foreign_adapter_is_not_of_the_one_before(tmp_path: Path, kind: str) -> None:
    foreign = FakePort("i40iw0", state="Down", phys="Disabled", rate=10, layer="Ethernet", ca_type="I40IW")
    node = h800_node(tmp_path, ports=[*sound_ports()[:8], foreign]).write()
    text = (node.bin / "ibstat.txt").read_text()
    (node.bin / "ibstat.txt").write_text(
        text.replace("CA 'i40iw0'", f"{kind} 'i40iw0'").replace("CA type: I40", "T: I40")
    )
    assert {c: r.state for c, r in node.judge().items() if c.startswith("hca.") and r.state != "PASS"} == {}


UMAD = "ibpanic: [4260] main: can't init UMAD library: (No such file or directory)"


@pytest.mark.parametrize(
    ("program", "word"),
    [
        (f'#!/bin/sh\necho "{UMAD}" >&2\nexit 255\n', "modprobe ib_umad"),
        ("#!/bin/sh\nexit 0\n", "ibstat; echo $?"),
        (
            '#!/bin/sh\nhead -60 "$(dirname "$0")/ibstat.txt"\necho \'ibpanic: stat of IB device\' >&2\nexit 255\n',
            "ibstat",
        ),
        ("#!/bin/sh\nkill -SEGV $$\n", "ibstat"),
    ],
)
def test_a_dying_ibstat_is_a_warning_where_sysfs_and_verbs_are_sound(tmp_path: Path, program: str, word: str) -> None:
    results = hca_results(h800_node(tmp_path / "sound", programs={"ibstat": program}))
    assert results["hca.ibstat"].state == "WARN"
    assert word in results["hca.ibstat"].fix
    assert results["hca.agree"].state in ("SKIP", "WARN")
    assert {c for c, r in results.items() if r.state == "FAIL"} == set()
    broken = [FakePort("mlx5_0", state="Down", phys="Polling", rate=10), *sound_ports()[1:]]
    results = hca_results(h800_node(tmp_path / "broken", programs={"ibstat": program}, ports=broken))
    assert (results["hca.rails"].state, results["hca.ibstat"].state) in (("FAIL", "FAIL"), ("FAIL", "ERROR"))


def opens(*numbers: int) -> str:
    """An ibv_devinfo that opens these and fails for another device."""
    listed = "".join(f"echo 'hca_id:\tmlx5_{i}'\n" for i in numbers)
    return f"#!/bin/sh\n{listed}echo 'Failed to open device' >&2\nexit 255\n"


@pytest.mark.parametrize(
    ("program", "state"),
    [
        (opens(), "FAIL"),
        (opens(0, 1, 2, 3, 4, 5, 6), "FAIL"),
        (opens(0, 1, 2, 3, 4, 5, 6, 7), "WARN"),
        ("#!/bin/sh\nexit 0\n", "FAIL"),
        ("#!/bin/sh\nexec sleep 60\n", "ERROR"),
    ],
)
def test_a_device_that_is_listed_and_cannot_be_opened_fails(tmp_path: Path, program: str, state: str) -> None:
    node = h800_node(tmp_path, programs={"ibv_devinfo": program}, sets=("preflight.command_timeout_s=2",))
    assert hca_results(node)["hca.verbs"].state == state


def same_hcas(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> CheckResult | None:
    tables = {
        node: collect_agreement({"hca": {"ports": ports}, "versions": {}, "paths": {"paths": {}}}, most_rails=8)
        for node, ports in (("n1", first), ("n2", second))
    }
    return next((r for r in judge_agreement(tables) if r.id == "same.hcas"), None)


def test_renumbered_hcas_are_the_same_and_others_are_not() -> None:
    renumbered = [port(f"mlx5_{i}") for i in (0, 3, 4, 5, 6, 7, 8, 9)]
    eth = [port(f"mlx5_{i}", 100, link_layer="Ethernet", ca_type="MT4127") for i in (1, 2)]
    expected = {
        "renumbered": (many(8), [*renumbered, *eth], "PASS"),
        "firmware": (many(8), many(8, firmware="28.41.1000"), "WARN"),
        "rate": (many(8), many(8, 200), "FAIL"),
        "number": (many(8), many(4), "FAIL"),
        "one slow": (many(8), [*many(7), port("mlx5_7", 200)], "FAIL"),
        "pcie": (many(8, pcie_width="16", pcie_speed="32.0"), many(8, pcie_width="8", pcie_speed="32.0"), "FAIL"),
        "one down": (many(8), [*many(7), port("mlx5_7", up=False)], "FAIL"),
        "cabled storage": (many(8), [*many(8), port("mlx5_8"), port("mlx5_9")], "PASS"),
        "unplugged storage": (many(8), [*many(8), port("mlx5_8", up=False)], "PASS"),
    }
    found = {name: same_hcas(first, second) for name, (first, second, _) in expected.items()}
    assert {name: r.state if r else None for name, r in found.items()} == {k: v[2] for k, v in expected.items()}


@drawn(150)
@given(lost=st.sets(st.integers(0, 7), min_size=1), text=st.sampled_from(["", "hca_id:", "hca_id:\tmlx", "\0", "²"]))
def test_lost_lines_of_ibv_devinfo_never_pass(lost: set[int], text: str) -> None:
    opened = "\n".join(text if i in lost else f"hca_id:\tmlx5_{i}" for i in range(8))
    facts = {
        "hca": {"ports": many(8), "folder": "/sys"},
        "ibstat": {"text": "", "stderr": "", "problem": None, "error": "ibstat is not on PATH"},
        "verbs": {
            "text": "".join(f"  mlx5_{i}  {1:016x}\n" for i in range(8)), "problem": None, "error": None,
            "opened": {"text": opened, "problem": None, "error": None},
        },
        "peermem": {"module": "nvidia_peermem", "version": "1"},
    }  # fmt: skip
    (verbs,) = (r for r in judge_hcas(facts, IB, node="n1") if r.id == "hca.verbs")
    assert verbs.state == "FAIL"
