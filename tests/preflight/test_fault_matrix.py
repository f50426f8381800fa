"""Faults of a node, put there as programs on PATH and a sysfs tree: each is found, named and not called a pass.

The programs are real processes that the facts phase starts; only the hardware is pretended.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from node_faults import FAULTS, HANGS, with_port
from node_fixtures import OF_THIS_MACHINE, FakeNode, h800_node

from janus_cluster.preflight.static import judge_static
from janus_cluster.run.records.verdict import CheckResult, worst

HARDWARE = ("gpu", "hca")


def test_a_sound_node_has_no_fault_but_for_limits_of_this_machine(tmp_path: Path) -> None:
    judged = h800_node(tmp_path).write().judge()
    odd = {i: r.measured for i, r in judged.items() if r.state not in ("PASS", "SKIP") and not i.startswith("paths")}
    assert {i: words for i, words in odd.items() if i not in OF_THIS_MACHINE} == {}
    assert judged["versions.driver"].measured == "driver 570.158.01, CUDA 12.8"
    assert "torch 2.9.1+cu128" in judged["versions"].measured
    assert "nccl 2.27.5" in judged["versions"].measured


def test_a_sound_node_has_no_fault_in_gpus_and_rails(tmp_path: Path) -> None:
    judged = h800_node(tmp_path).write().judge()
    faults = {i: (r.state, r.measured) for i, r in judged.items() if i.startswith(HARDWARE) and r.state != "PASS"}
    assert faults == {}
    assert {i for i in judged if i.startswith(HARDWARE)} == {
        "gpu.count", "gpu.model", "gpu.memory", "gpu.ecc", "gpu.remapped_rows", "gpu.throttle", "gpu.pcie_width",
        "gpu.persistence", "gpu.fabric", "gpu.mig", "gpu.recovery", "gpu.power", "gpu.processes", "gpu.nvlink",
        "gpu.xid", "hca.rails", "hca.ibstat", "hca.agree", "hca.verbs", "hca.pcie_width",
        "hca.firmware", "hca.peermem",
    }  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_named(tmp_path: Path, fault: str) -> None:
    changes, check_id, state, word = FAULTS[fault]
    result = h800_node(tmp_path, **changes).write().judge()[check_id]
    assert (result.state, result.node) == (state, "h800-01"), result
    assert word in result.measured
    assert result.measured
    assert result.expected
    assert result.threshold_source
    if state != "SKIP":
        assert "h800-01" in result.fix or result.fix.startswith("as root") or "nvidia-smi" in result.fix


@pytest.mark.slow
@pytest.mark.parametrize("how", HANGS)
def test_a_hung_nvidia_smi_is_an_error_within_its_time_limit(tmp_path: Path, how: str) -> None:
    node = h800_node(tmp_path, programs={"nvidia-smi": HANGS[how]}, sets=("preflight.command_timeout_s=1.5",)).write()
    begun = time.monotonic()
    judged = node.judge()
    assert time.monotonic() - begun < 15
    assert judged["gpu.count"].state == "ERROR"
    assert "did not answer within 1.5 s" in judged["gpu.count"].measured
    assert [i for i, r in judged.items() if i.startswith("gpu") and r.state == "PASS"] == ["gpu.xid"]


def test_missing_programs_are_never_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = h800_node(tmp_path).write()
    wanted = {
        "nvidia-smi": ("gpu.count", "ERROR"),
        "ibstat": ("hca.ibstat", "WARN"),
        "ibv_devices": ("hca.verbs", "WARN"),
    }
    for name in wanted:
        (node.bin / name).unlink()
    # A machine with GPUs has programs of these names itself: they are not on this PATH, though maybe in /usr/sbin.
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "cat").symlink_to(shutil.which("cat") or "cat")
    monkeypatch.setenv("PATH", str(tools))
    missing = [checked for name, checked in wanted.items() if not shutil.which(name, path="/usr/sbin:/sbin")]
    judged = node.judge()
    assert [(check, judged[check].state) for check, _ in missing] == missing
    assert worst([r.state for r in judged.values()]) in ("ERROR", "FAIL")


def test_the_same_node_is_skipped_with_a_reason_under_profile_cpu(tmp_path: Path) -> None:
    node = h800_node(
        tmp_path, sets=("preflight.profile=cpu", "hardware.device=cpu", "environment.profile=cpu"), ports=[]
    ).write()
    judged = node.judge()
    assert {i: r.state for i, r in judged.items() if i.startswith(HARDWARE)} == {"gpu": "SKIP", "hca": "SKIP"}
    assert all("wants no" in judged[i].measured for i in HARDWARE)


def test_a_class_folder_alone_serves_as_the_root(tmp_path: Path) -> None:
    node = h800_node(tmp_path).write()
    for root in (node.root / "sys", node.root / "sys" / "class" / "infiniband"):
        node.sets = (f"preflight.sysfs_root={root}",)
        assert node.judge()["hca.rails"].state == "PASS"


def test_a_small_dev_shm_is_found(tmp_path: Path) -> None:
    node = h800_node(tmp_path).write()
    shm = node.root / "dev" / "shm"
    shm.mkdir(parents=True)
    small_tmpfs(shm, "64m")
    try:
        result = node.judge()["limits.shm"]
    finally:
        unmount(shm)
    assert (result.state, result.unit) == ("FAIL", "GiB")
    assert result.measured == "64 MiB"


def small_tmpfs(folder: Path, size: str, *options: str) -> None:
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip(f"needs root to mount a small tmpfs: {done.stderr.strip()}")


def unmount(folder: Path) -> None:
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_an_output_that_cannot_hold_the_run_is_found(tmp_path: Path, kind: str) -> None:
    from janus_cluster.preflight.paths import judge_output, read_output

    folder = tmp_path / "out"
    folder.mkdir()
    small_tmpfs(folder, "600k", *(["ro"] if kind == "read-only" else []))
    try:
        fact = read_output(folder)
    finally:
        unmount(folder)
    (result, *_) = judge_output(fact, node="h800-02", min_free_gb=0, room_bytes=0)
    assert (result.state, result.node) == ("FAIL", "h800-02")
    assert ("no space left" if kind == "full" else "Read-only") in result.measured
    assert "df -h" in result.fix


def test_a_low_memlock_is_found(tmp_path: Path) -> None:
    node = h800_node(tmp_path).write()
    code = (
        "import resource, runpy, sys\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))\n"
        "from janus_cluster.preflight.limits import read_limits, judge_limits\n"
        "from janus_cluster.preflight.sysfs import NodeRoot\n"
        "print(read_limits(NodeRoot.of(None))['memlock_bytes'])\n"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert int(output) == 65536
    resolved = node.resolve()
    facts = node.facts(resolved)
    facts["limits"]["memlock_bytes"] = int(output)
    result = next(r for r in judge_static({"h800-01": facts}, resolved) if r.id == "limits.memlock")
    assert (result.state, result.measured) == ("FAIL", "64 KiB")
    assert "ulimit -l" in result.fix


def two_nodes(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> list[CheckResult]:
    """h800-02's facts are h800-01's but for `change`."""
    node = h800_node(tmp_path).write()
    resolved = node.resolve()
    facts = node.facts(resolved)
    other = {**facts, "node": "h800-02", "versions": dict(facts["versions"])}
    change(other)
    return judge_static({"h800-01": facts, "h800-02": other}, resolved)


def test_other_versions_on_node_2_are_attributed_to_it(tmp_path: Path) -> None:
    results = two_nodes(tmp_path, lambda facts: facts["versions"].update(torch="2.8.0", nccl="2.21.5"))
    bad = [r for r in results if r.id == "versions.same" and r.state == "FAIL"]
    assert [r.node for r in bad] == ["h800-02"]
    assert "torch 2.8.0 ≠" in bad[0].measured
    assert "nccl 2.21.5 ≠" in bad[0].measured


def test_an_absent_node_is_a_failure_of_that_node(tmp_path: Path) -> None:
    node = h800_node(tmp_path).write()
    resolved = node.resolve()
    results = judge_static({"h800-01": node.facts(resolved), "h800-02": None}, resolved)
    assert [(r.node, r.state) for r in results if r.id == "reported"] == [("h800-01", "PASS"), ("h800-02", "FAIL")]
    assert {r.id for r in results if r.node == "h800-02"} == {"reported"}


def test_the_facts_phase_of_a_node_is_a_process_of_under_five_seconds(tmp_path: Path) -> None:
    node: FakeNode = h800_node(tmp_path, ports=with_port(3, state="Down", phys="Polling", rate=10)).write()
    resolved = node.resolve()
    facts = node.facts_of_process(resolved)
    assert facts["duration_s"] < 5
    bad = next(r for r in judge_static({"h800-01": facts}, resolved) if r.id == "hca.rails")
    assert (bad.state, "mlx5_3:1" in bad.measured) == ("FAIL", True)


def test_limits_of_this_process_are_the_kernels() -> None:
    from janus_cluster.preflight.limits import read_limits
    from janus_cluster.preflight.sysfs import NodeRoot

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert read_limits(NodeRoot.of(None))["nofile"] == soft
