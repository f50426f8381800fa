"""Judges at, above and below their thresholds; readers on real files and on programs put on PATH."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from janus_cluster.preflight.all_reduce import busbw_gb_per_s, judge_all_reduce
from janus_cluster.preflight.gpu import judge_gpus, parse_gpus, read_gpus
from janus_cluster.preflight.hca import judge_hcas, read_hcas
from janus_cluster.preflight.model import CheckResult, Verdict, worst
from janus_cluster.preflight.paths import judge_paths, read_paths
from janus_cluster.preflight.profile import load_profile
from janus_cluster.preflight.report import render_verdict, render_verdict_markdown
from janus_cluster.preflight.versions import PACKAGES, judge_same_versions, judge_versions, read_versions
from janus_cluster.resources import templates_dir

H800 = load_profile(templates_dir(), "h800")
CPU = load_profile(templates_dir(), "cpu")


def result(state: str, node: str = "n1", check: str = "x") -> CheckResult:
    return CheckResult(id=check, phase="static", node=node, state=state, measured="m", expected="e")  # type: ignore[arg-type]


def verdict(*results: CheckResult) -> Verdict:
    return Verdict(
        state=worst([r.state for r in results]),
        job_id="7",
        config_hash="c" * 64,
        nodes=("n1", "n2"),
        created_at=0.0,
        results=results,
    )


@pytest.mark.parametrize(
    ("states", "wins"),
    [
        (["PASS", "SKIP"], "PASS"),
        (["PASS", "WARN", "SKIP"], "WARN"),
        (["WARN", "ERROR"], "ERROR"),
        (["ERROR", "FAIL", "PASS"], "FAIL"),
        (["SKIP"], "SKIP"),
        ([], "ERROR"),
    ],
)
def test_the_worst_result_wins_and_nothing_is_never_a_pass(states: list[str], wins: str) -> None:
    assert worst(states) == wins


def test_busbw_is_as_nccl_tests_defines_it() -> None:
    assert busbw_gb_per_s([0.01, 0.02, 0.5], payload_bytes=10**9, world_size=8) == pytest.approx(50 * 1.75)
    assert busbw_gb_per_s([1.0], payload_bytes=10**9, world_size=2) == pytest.approx(1.0)
    assert busbw_gb_per_s([1.0], payload_bytes=10**9, world_size=16) == pytest.approx(1.875)
    assert busbw_gb_per_s([1.0], payload_bytes=10**9, world_size=1) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="positive"):
        busbw_gb_per_s([], payload_bytes=1, world_size=2)


def all_reduce(**changes: Any) -> dict[str, Any]:
    facts = {"world_size": 2, "backend": "gloo", "payload_bytes": 10**9, "times_s": [0.5] * 3, "sum_correct": True}
    return facts | changes


@pytest.mark.parametrize(
    ("facts", "state", "word"),
    [
        (all_reduce(), "PASS", "2 GB/s busbw (1000 MB"),
        (all_reduce(times_s=[0.4] * 3), "PASS", "2.5"),
        (all_reduce(times_s=[0.6] * 3), "FAIL", "1.67"),
        (all_reduce(sum_correct=False), "FAIL", "sum was wrong"),
        (all_reduce(world_size=1), "FAIL", "1 of 2 ranks"),
        (None, "FAIL", "did not report"),
    ],
)
def test_all_reduce_is_judged_at_above_and_below_the_floor(facts: dict[str, Any] | None, state: str, word: str) -> None:
    judged = judge_all_reduce(facts, node="n1", world_size=2, floor_gb_per_s=2.0, source="s")
    assert judged.state == state
    assert word in judged.measured
    assert (judged.fix == "") == (state == "PASS")


def test_paths_are_read_and_judged(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("x")
    wanted = {name: str(tmp_path / name) for name in ("empty", "file", "folder", "absent")}
    judged = judge_paths(read_paths(wanted, tmp_path), node="n1", min_free_gb=0.0)
    states = {r.id: r.state for r in judged}
    assert states == {"empty": "FAIL", "file": "PASS", "folder": "PASS", "absent": "FAIL", "paths.run_dir": "PASS"}
    assert "No such file" in next(r.measured for r in judged if r.id == "absent")


@pytest.mark.parametrize(("free_gb", "state"), [(5.0, "PASS"), (5.1, "PASS"), (4.9, "FAIL")])
def test_free_space_is_judged_at_its_threshold(free_gb: float, state: str) -> None:
    facts = {"paths": {}, "run_dir": {"path": "/r", "writable": True, "free_bytes": free_gb * 1e9}}
    assert judge_paths(facts, node="n1", min_free_gb=5.0)[0].state == state


def test_a_run_folder_that_cannot_be_written_fails() -> None:
    facts = {"paths": {}, "run_dir": {"path": "/r", "writable": False, "free_bytes": 1e12}}
    assert judge_paths(facts, node="n1", min_free_gb=1.0)[0].measured == "not writable"


def test_versions_of_this_environment_are_read() -> None:
    facts = read_versions()
    assert facts["python"]
    assert facts["janus-cluster"]
    assert judge_versions(facts, node="n1", python_min="99.0")[0].state == "FAIL"


def test_a_missing_package_and_a_differing_node_fail() -> None:
    whole: dict[str, str | None] = {"python": "3.11.7"} | dict.fromkeys(PACKAGES, "1.0")
    assert judge_versions(whole, node="n1", python_min="3.10")[0].state == "PASS"
    lacking = judge_versions(whole | {"torch": None}, node="n1", python_min="3.10")[0]
    assert (lacking.state, "torch not installed" in lacking.measured) == ("FAIL", True)
    judged = judge_same_versions({"n1": whole, "n2": whole | {"torch": "2.0"}})
    assert [(r.node, r.state) for r in judged] == [("n1", "PASS"), ("n2", "FAIL")]
    assert "torch 2.0 ≠ 1.0" in judged[1].measured


def gpu_rows(count: int, name: str = "NVIDIA H800", memory: str = "81559") -> str:
    return "".join(f"{i}, {name}, {memory}\n" for i in range(count))


@pytest.mark.parametrize(
    ("text", "state"),
    [
        (gpu_rows(8), "PASS"),
        (gpu_rows(7), "FAIL"),
        (gpu_rows(9), "FAIL"),
        (gpu_rows(8, "NVIDIA H800 PCIe"), "FAIL"),
        (gpu_rows(8, memory="40000"), "FAIL"),
        (gpu_rows(7) + "7, NVIDIA H800, [Unknown Error]\n", "FAIL"),
        ("Unable to determine the device handle for GPU0000:3B:00.0: Unknown Error\n" + gpu_rows(8), "FAIL"),
        ("", "FAIL"),
    ],
)
def test_gpus_pass_only_when_all_are_there_and_of_the_wanted_model(text: str, state: str) -> None:
    assert judge_gpus(parse_gpus(text), H800["gpu"], node="n1", gpus_per_node=8)[0].state == state


def test_no_nvidia_smi_is_never_a_pass() -> None:
    facts = {"error": "nvidia-smi is not on PATH"}
    assert judge_gpus(facts, H800["gpu"], node="n1", gpus_per_node=8)[0].state == "ERROR"
    assert judge_gpus(facts, CPU["gpu"], node="n1", gpus_per_node=8)[0].state == "SKIP"


@pytest.mark.parametrize(("code", "word"), [(0, "gpus"), (9, "error")])
def test_nvidia_smi_is_called_and_its_failure_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, word: str
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '0, NVIDIA H800, 81559'\nexit {code}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert word in read_gpus()


def write_port(root: Path, device: str, *, state: str, phys: str, rate: str, layer: str) -> None:
    port = root / device / "ports" / "1"
    port.mkdir(parents=True)
    for name, value in (("state", state), ("phys_state", phys), ("rate", rate), ("link_layer", layer)):
        (port / name).write_text(value + "\n")


def make_rails(root: Path, count: int, *, rate: str = "400 Gb/sec (4X NDR)") -> None:
    for i in range(count):
        write_port(root, f"mlx5_{i}", state="4: ACTIVE", phys="5: LinkUp", rate=rate, layer="InfiniBand")


def judged_hca(root: Path) -> CheckResult:
    return judge_hcas(read_hcas(root), H800["hca"], node="n1")[0]


def test_eight_sound_rails_pass_and_a_down_ethernet_port_is_no_fault(tmp_path: Path) -> None:
    make_rails(tmp_path, 8)
    write_port(tmp_path, "mlx5_8", state="1: DOWN", phys="3: Disabled", rate="40 Gb/sec (4X QDR)", layer="Ethernet")
    assert judged_hca(tmp_path).state == "PASS"


@pytest.mark.parametrize(
    ("state", "phys", "rate"),
    [
        ("1: DOWN", "2: Polling", "10 Gb/sec (4X SDR)"),
        ("2: INIT", "5: LinkUp", "400 Gb/sec (4X NDR)"),
        ("4: ACTIVE", "5: LinkUp", "200 Gb/sec (4X HDR)"),
    ],
)
def test_one_bad_rail_fails_and_is_named(tmp_path: Path, state: str, phys: str, rate: str) -> None:
    make_rails(tmp_path, 7)
    write_port(tmp_path, "mlx5_7", state=state, phys=phys, rate=rate, layer="InfiniBand")
    judged = judged_hca(tmp_path)
    assert judged.state == "FAIL"
    assert "mlx5_7:1" in judged.measured


def test_no_hca_at_all_fails_where_infiniband_is_wanted(tmp_path: Path) -> None:
    assert judged_hca(tmp_path / "absent").state == "FAIL"
    assert judge_hcas(read_hcas(tmp_path), CPU["hca"], node="n1")[0].state == "SKIP"


def test_a_verdict_survives_its_json_and_names_the_bad_node() -> None:
    v = verdict(result("PASS"), result("FAIL", "n2", "paths.model"))
    assert Verdict.from_json(v.to_json()) == v
    assert v.exclude == ("n2",)
    assert v.summary() == "preflight FAIL: n2 paths.model (m)"
    assert v.of_node("n1").state == "PASS"
    assert v.worst_first()[0].node == "n2"


def test_the_report_shows_worst_first_and_the_exclude_line() -> None:
    from rich.console import Console

    v = verdict(result("PASS"), result("FAIL", "n2", "paths.model"))
    console = Console(width=120, record=True, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123
    console.print(render_verdict(v))
    console.file.close()
    text = console.export_text()
    assert text.index("FAIL") < text.index("PASS")
    assert "--exclude=n2" in text
    assert "| FAIL | n2 | paths.model |" in render_verdict_markdown(v)
