"""Sound nodes of real sites that look odd, and odd ones that look sound: cgroups, DMA-BUF, /usr/sbin, unused ports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from node_fixtures import write_program

from janus_cluster.job.profiles import load_preflight_profile
from janus_cluster.preflight.command import run_command
from janus_cluster.preflight.cross_node import judge_cross_node
from janus_cluster.preflight.hca import parse_nccl_list, read_peermem
from janus_cluster.preflight.hca_judge import judge_hcas
from janus_cluster.preflight.ibstat import parse_ibstat
from janus_cluster.preflight.limits import GIB, judge_limits, read_limits, read_memory_limit
from janus_cluster.preflight.sysfs import NodeRoot

IB = load_preflight_profile("h800-ib")
OPENED = {"text": "", "problem": None, "error": "ibv_devinfo is not on PATH"}
STEP = "slurmstepd.scope/job_7/step_0/user/task_0"


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def node(tmp_path: Path) -> NodeRoot:
    """A node of 2 TB with nothing else in it."""
    put(tmp_path / "proc" / "meminfo", "MemAvailable:   2000000000 kB\n")
    (tmp_path / "sys").mkdir()
    return NodeRoot.of(str(tmp_path))


def memory(node: NodeRoot) -> tuple[str, str, str]:
    (result,) = (r for r in judge_limits(read_limits(node), IB["limits"], node="n1") if r.id == "limits.memory")
    return result.state, result.measured, result.fix


def test_the_jobs_own_memory_limit_counts_and_not_the_nodes_memory(node: NodeRoot) -> None:
    put(node.proc / "self" / "cgroup", f"0::/system.slice/{STEP}\n")
    cgroups = node.sys / "fs" / "cgroup" / "system.slice"
    put(cgroups / STEP / "memory.max", "max\n")
    put(cgroups / "slurmstepd.scope" / "job_7" / "memory.max", f"{64 * GIB}\n")
    state, measured, fix = memory(node)
    assert (state, measured) == ("WARN", "64 GiB")
    assert "--set slurm.mem=0" in fix


def test_version_1_cgroups_have_their_limit_elsewhere(node: NodeRoot) -> None:
    put(node.proc / "self" / "cgroup", "5:cpuset:/\n4:cpu,memory:/slurm/uid_1/job_7/step_0\n0::/\n")
    slurm = node.sys / "fs" / "cgroup" / "memory" / "slurm"
    put(slurm / "memory.limit_in_bytes", f"{2**63 - 4096}\n")
    assert read_memory_limit(node) is None
    put(slurm / "uid_1" / "job_7" / "memory.limit_in_bytes", f"{8 * GIB}\n")
    assert read_memory_limit(node) == 8 * GIB


@pytest.mark.parametrize("cgroup", [None, "", "0::/\n", "no such line\n", "0::/gone\n"])
def test_without_a_limit_the_nodes_memory_counts(node: NodeRoot, cgroup: str | None) -> None:
    if cgroup is not None:
        put(node.proc / "self" / "cgroup", cgroup)
    assert memory(node)[0] == "PASS"


@pytest.mark.parametrize(
    ("taint", "kernel", "state"),
    [
        ("OE", "5.15.0-116-generic", "WARN"),
        ("OE", "5.12.0", "WARN"),
        ("OE", "5.4.0-150-generic", "FAIL"),
        ("POE", "5.15.0-116-generic", "FAIL"),
        (None, "6.8.0", "FAIL"),
    ],
)
def test_dma_buf_does_without_peermem(node: NodeRoot, taint: str | None, kernel: str, state: str) -> None:
    put(node.proc / "sys" / "kernel" / "osrelease", kernel + "\n")
    if taint is not None:
        put(node.sys / "module" / "nvidia" / "taint", taint + "\n")
    silent = {"text": "", "stderr": "", "problem": None, "error": None, "opened": OPENED}
    facts = {"hca": {"ports": [], "folder": "x"}, "ibstat": silent, "verbs": silent, "peermem": read_peermem(node)}
    found = {r.id: r.state for r in judge_hcas(facts, IB["hca"], node="n1")}
    assert found["hca.peermem"] == state


def test_a_program_of_usr_sbin_is_found_from_a_users_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_program(tmp_path / "tell", '#!/bin/sh\nprintf "%s" "$PATH"\n')
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_command(["tell"], timeout_s=10).stdout == f"{tmp_path}:/usr/sbin:/sbin"


def test_an_unused_port_is_a_warning_where_infiniband_carries_the_data() -> None:
    def interface(host: int, carrier: bool) -> list[dict[str, Any]]:
        return [{"name": "eno2", "address": f"192.168.1.{host}", "network": "192.168.1.0/24", "carrier": carrier}]

    sets: dict[str, dict[str, Any]] = {
        "n1": {"interfaces": interface(1, False)},
        "n2": {"interfaces": interface(2, False)},
    }
    assert {r.state for r in judge_cross_node(sets)} == {"FAIL"}
    with_gpus = {name: facts | {"gpu": {}} for name, facts in sets.items()}
    assert {r.state for r in judge_cross_node(with_gpus)} == {"WARN"}


@pytest.mark.parametrize(
    ("kernel", "reported"),
    [
        ("4: PortConfigurationTraining", "PortConfigurationTraining"),
        ("6: LinkErrorRecovery", "LinkErrorRecovery"),
        ("7: Phy Test", "PhyTest"),
    ],
)
def test_a_port_in_training_is_the_same_in_both_wordings(kernel: str, reported: str) -> None:
    text = (
        "CA 'mlx5_0'\n\tCA type: MT4129\n\tPort 1:\n\t\tState: Down\n"
        f"\t\tPhysical state: {reported}\n\t\tRate: 10\n\t\tLink layer: InfiniBand\n"
    )
    assert parse_ibstat(text)["damaged"] == []
    port = {"device": "mlx5_0", "port": "1", "state": "1: DOWN", "phys_state": kernel, "rate": "10 Gb/sec (4X SDR)"}
    ibstat = {"text": text, "stderr": "", "problem": None, "error": None, "opened": OPENED}
    facts = {
        "hca": {"ports": [port | {"link_layer": "InfiniBand", "ca_type": "MT4129"}], "folder": "x"},
        "ibstat": ibstat,
        "verbs": ibstat,
        "peermem": {"module": None, "version": None},
    }
    found = {r.id: r.state for r in judge_hcas(facts, IB["hca"], node="n1")}
    assert (found["hca.agree"], found["hca.rails"]) == ("PASS", "FAIL")


def test_more_ports_than_rails_may_be_storage_and_the_way_out_is_reported() -> None:
    sound = {
        "port": "1",
        "state": "4: ACTIVE",
        "phys_state": "5: LinkUp",
        "link_layer": "InfiniBand",
        "ca_type": "MT4129",
    }
    ports = [sound | {"device": f"mlx5_{i}", "rate": "400 Gb/sec (4X NDR)"} for i in range(8)]
    ports += [sound | {"device": "mlx5_8", "rate": "200 Gb/sec (4X HDR)"}]
    silent = {"text": "", "stderr": "", "problem": None, "error": "ibstat is not on PATH", "opened": OPENED}
    facts = {"hca": {"ports": ports, "folder": "x"}, "ibstat": silent, "verbs": silent, "peermem": {"module": None}}
    (found,) = (r for r in judge_hcas(facts, IB["hca"], node="n1") if r.id == "hca.rails")
    names = ",".join(f"mlx5_{i}:1" for i in range(8))
    assert found.state == "WARN" and f"--set environment.variables.NCCL_IB_HCA=={names}" in found.fix
    chosen = parse_nccl_list(f"={names}")
    (found,) = (r for r in judge_hcas(facts, IB["hca"], node="n1", chosen=chosen) if r.id == "hca.rails")
    assert found.state == "PASS"
