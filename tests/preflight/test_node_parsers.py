"""Every parser on text of the true shape, and on the damage that real nodes show."""

from __future__ import annotations

import pytest
from node_fixtures import FakePort, gpu_rows, smi_texts, sound_ports, verbs_text

from janus_cluster.job.profiles import load_preflight_profile
from janus_cluster.preflight.gpu import parse_number
from janus_cluster.preflight.gpu_health import judge_ecc, judge_fabric, judge_pcie, judge_remapped, judge_throttle
from janus_cluster.preflight.gpu_query import FAMILIES, parse_table
from janus_cluster.preflight.hca import NcclList, natural, parse_nccl_list, rails, rate_gb_per_s
from janus_cluster.preflight.hca_judge import from_ibstat
from janus_cluster.preflight.ibstat import parse_ibstat, parse_verbs
from janus_cluster.preflight.limits import parse_available
from janus_cluster.preflight.nvlink import judge_nvlink, parse_nvlink
from janus_cluster.preflight.route import parse_default_route
from janus_cluster.preflight.versions import numbers

H800 = load_preflight_profile("h800-ib")
IDENTITY = FAMILIES["identity"][0]
IBSTAT = "".join(p.ibstat() for p in sound_ports())


def test_a_table_is_read_with_and_without_its_header() -> None:
    text = smi_texts()["identity"]
    with_header = parse_table(text, IDENTITY)
    without = parse_table("\n".join(gpu_rows()), IDENTITY)
    assert with_header == without
    assert with_header["damaged"] == []
    assert with_header["rows"][7]["name"] == "NVIDIA H800"


@pytest.mark.parametrize(
    "header",
    [
        ", ".join(IDENTITY[1:]),
        ", ".join([*IDENTITY, IDENTITY[0]]),
        ", ".join([IDENTITY[1], *IDENTITY[1:]]),
    ],
)
def test_a_damaged_header_costs_no_column(header: str) -> None:
    table = parse_table("\n".join([header, *gpu_rows()]), IDENTITY)
    assert table["damaged"] == [header]
    assert table["rows"] == parse_table("\n".join(gpu_rows()), IDENTITY)["rows"]


def test_a_field_echoed_under_its_newer_name_is_recognised_by_its_place() -> None:
    fields = FAMILIES["throttle"][1]
    table = parse_table("index, clocks_event_reasons.active\n0, 0x0000000000000004\n", fields)
    assert judge_throttle(table["rows"][0]) == ("PASS", "0x4")


@pytest.mark.parametrize(
    "line",
    [
        "Unable to determine the device handle for GPU0000:1F:00.0: Unknown Error",
        "3, [Unknown Error], [Unknown Error]",
        "3, GPU-3, NVIDIA H800, 81559, 570.158.01, 00000000:1E:00.0, extra",
        gpu_rows()[3],
        "Kein Gerät gefunden",
    ],
)
def test_a_line_that_is_no_row_is_kept_as_damage(line: str) -> None:
    table = parse_table("\n".join([*gpu_rows(), line]), IDENTITY)
    assert len(table["rows"]) == 8
    assert len(table["damaged"]) == 1


@pytest.mark.parametrize(
    ("text", "number"),
    [("81559", 81559.0), ("81559 MiB", 81559.0), ("16", 16.0), ("[N/A]", None), ("", None), ("-1", None), ("²", None)],
)
def test_a_number_is_read_only_from_a_number(text: str, number: float | None) -> None:
    assert parse_number(text) == number


@pytest.mark.parametrize(
    ("bits", "state"),
    [
        ("0x0000000000000000", "PASS"),
        ("0x0000000000000001", "PASS"),
        ("0x0000000000000005", "PASS"),
        ("0x0000000000000002", "WARN"),
        ("0x0000000000000200", "WARN"),
        ("0x0000000000000008", "FAIL"),
        ("0x0000000000000020", "FAIL"),
        ("0x0000000000000041", "FAIL"),
        ("0x0000000000000080", "FAIL"),
        ("[Unknown Error]", "ERROR"),
        ("Active", "ERROR"),
        ("0xzz", "ERROR"),
    ],
)
def test_each_throttle_bit_has_its_verdict(bits: str, state: str) -> None:
    assert judge_throttle({"clocks_event_reasons.active": bits})[0] == state
    assert judge_throttle({"clocks_throttle_reasons.active": bits})[0] == state


def test_health_that_is_not_reported_is_never_a_pass() -> None:
    for judge in (judge_ecc, judge_remapped, judge_throttle, judge_fabric, lambda row: judge_pcie(row, 16)):
        for value in ("", "[N/A]", "[GPU requires reset]", "[Unknown Error]"):
            row = dict.fromkeys([f for family in FAMILIES.values() for fields in family for f in fields], value)
            row |= {f"remapped_rows.{k}": value for k in ("pending", "failure", "uncorrectable")}
            assert judge(row)[0] not in ("PASS", "SKIP")


@pytest.mark.parametrize(("width", "state"), [("16", "PASS"), ("32", "PASS"), ("15", "FAIL"), ("8", "FAIL")])
def test_pcie_width_is_judged_at_its_threshold(width: str, state: str) -> None:
    assert judge_pcie({"pcie.link.width.current": width}, 16)[0] == state


def nvlink_fact(text: str) -> dict[str, str | None]:
    return {"text": text, "problem": None, "error": None}


def nvlink_state(text: str) -> tuple[str, str]:
    identity = {**parse_table(smi_texts()["identity"], IDENTITY), "problem": None, "error": None}
    tables = {"identity": identity, "nvlink": nvlink_fact(text)}
    (result,) = judge_nvlink(tables, H800["gpu"], node="n1", gpus_per_node=8)
    return result.state, result.measured


def test_nvlink_of_a_pcie_card_is_inactive_by_design() -> None:
    card = "".join(
        f"GPU {i}: NVIDIA H800 PCIe (UUID: GPU-{i})\n"
        "NVML: Unable to retrieve NVLink information as all links are inactive\n"
        for i in range(8)
    )
    assert nvlink_state(card)[0] == "SKIP"
    assert nvlink_state(card.replace(" PCIe", ""))[0] == "FAIL"


def test_unwired_links_beside_enough_active_ones_are_no_fault() -> None:
    lines = [
        line
        for i in range(8)
        for line in (
            f"GPU {i}: NVIDIA H800 (UUID: GPU-{i})",
            *(f"         Link {k}: 26.562 GB/s" for k in range(8)),
            *(f"         Link {k}: <inactive>" for k in range(8, 18)),
        )
    ]
    assert nvlink_state("\n".join(lines))[0] == "PASS"
    lines[3] = "         Link 2: <inactive>"
    state, measured = nvlink_state("\n".join(lines))
    assert state == "FAIL"
    assert "GPU 0: 7 of 8 links" in measured


def test_nvlink_lines_without_their_gpu_are_damage() -> None:
    parsed = parse_nvlink("\t Link 0: 25 GB/s\nGPU 0: X (UUID: a)\n\t Link 0: 25 GB/s\n\t Link 0: 25 GB/s\n")
    assert len(parsed["damaged"]) == 2


def test_ibstat_is_read_whole() -> None:
    parsed = parse_ibstat(IBSTAT)
    assert parsed["damaged"] == []
    assert len(parsed["ports"]) == 10
    assert parsed["ports"][0]["firmware"] == "28.41.1000"
    assert len(rails({"ports": from_ibstat(parsed["ports"])})) == 8


def test_two_ports_of_one_adapter_are_two() -> None:
    one = FakePort("mlx4_0", rate=40)
    second = one.ibstat().split("\tPort 1:\n")[1].replace("State: Active", "State: Down")
    parsed = parse_ibstat(one.ibstat() + "\tPort 2:\n" + second)
    assert parsed["damaged"] == []
    assert [p["port"] for p in parsed["ports"]] == ["1", "2"]


@pytest.mark.parametrize(
    "damage",
    [
        IBSTAT.replace("CA 'mlx5_3'\n", ""),
        IBSTAT.replace("\tPort 1:\n", "", 1),
        IBSTAT.replace("\t\tRate: 400\n", "", 1),
        IBSTAT + IBSTAT,
        IBSTAT[:-30],
        IBSTAT.replace("State:", "Zustand:"),
        "ibpanic: [9] main: stat of IB device failed\n",
    ],
)
def test_damaged_ibstat_is_reported(damage: str) -> None:
    assert parse_ibstat(damage)["damaged"]


def test_no_adapter_prints_nothing_and_is_nothing() -> None:
    assert parse_ibstat("") == {"ports": [], "damaged": [], "foreign": []}


def test_a_header_without_devices_lists_none() -> None:
    assert parse_verbs(verbs_text([])) == []
    assert parse_verbs(verbs_text(["mlx5_0", "mlx5_1"])) == ["mlx5_0", "mlx5_1"]


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("400 Gb/sec (4X NDR)", 400.0),
        ("400", 400.0),
        ("2.5 Gb/sec", 2.5),
        ("unreadable", None),
        ("4000000000 Gb", None),
    ],
)
def test_a_rate_is_read_from_both_wordings(text: str, rate: float | None) -> None:
    assert rate_gb_per_s(text) == rate


def port(device: str, number: str = "1", **changes: str) -> dict[str, str]:
    sound = {"state": "4: ACTIVE", "phys_state": "5: LinkUp", "rate": "400 Gb/sec (4X NDR)", "ca_type": "MT4129"}
    return {"device": device, "port": number, "link_layer": "InfiniBand"} | sound | changes


def named(ports: list[dict[str, str]], chosen: NcclList | None = None) -> list[str]:
    return [f"{p['device']}:{p['port']}" for p in rails({"ports": ports}, chosen=chosen)]


def test_rails_are_distinguished_from_storage_roce_bond_and_spare_ports() -> None:
    rail = [port(f"mlx5_{i}") for i in range(8)]
    others = [
        port("mlx5_8", ca_type="MT4123", rate="200 Gb/sec (4X HDR)"),
        port("mlx5_9", link_layer="Ethernet"),
        port("mlx5_bond_0", link_layer="Ethernet"),
        port("mlx5_0", "2", state="1: DOWN", phys_state="2: Polling"),
    ]
    assert named(rail + others) == [f"mlx5_{i}:1" for i in range(8)]


def test_a_slow_or_down_port_of_the_rails_kind_stays_a_rail() -> None:
    ports = [port("mlx5_0"), port("mlx5_1", rate="100 Gb/sec (4X EDR)"), port("mlx5_2", state="1: DOWN")]
    assert named(ports) == ["mlx5_0:1", "mlx5_1:1", "mlx5_2:1"]


def test_the_users_exact_list_wins() -> None:
    ports = [port("mlx5_0"), port("mlx5_1"), port("mlx5_2")]
    assert named(ports, parse_nccl_list("=mlx5_0:1,mlx5_2")) == ["mlx5_0:1", "mlx5_2:1"]
    assert parse_nccl_list("") is parse_nccl_list(None) is parse_nccl_list("=") is None


def test_devices_are_sorted_as_people_count() -> None:
    assert sorted(["mlx5_10", "mlx5_2", "mlx5_bond_0", "mlx5_1"], key=natural) == [
        "mlx5_1", "mlx5_2", "mlx5_10", "mlx5_bond_0",
    ]  # fmt: skip


def test_available_memory_is_read_from_meminfo() -> None:
    assert parse_available("MemTotal:  10 kB\nMemAvailable:   2048 kB\nBuffers: 1 kB\n") == 2 * 2**20
    assert parse_available("MemTotal: 10 kB\n") is None


ROUTES = """Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth1\t00000000\t0100000A\t0003\t0\t0\t200\t00000000\t0\t0\t0
eth0\t00000000\t0100000A\t0003\t0\t0\t100\t00000000\t0\t0\t0
ib0\t0000000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
"""


def test_the_default_route_of_the_lowest_metric_is_taken() -> None:
    assert parse_default_route(ROUTES) == "eth0"
    assert parse_default_route(ROUTES.replace("0003", "0002")) is None
    assert parse_default_route("") is None


def test_a_version_is_compared_by_its_numbers() -> None:
    assert numbers("2.13.0+cpu") == (2, 13, 0)
    assert numbers("2.6.0rc1") == (2, 6, 0)
    assert numbers("unknown") == ()
