"""The gate as a job on a real two-node Slurm, with pretend hardware whose faults differ from node to node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from node_fixtures import FakeNode, h800_node, sound_ports, write_program

from janus_cluster.sandbox import SandboxInfo
from tests.tiny_data import write_tiny_data

pytestmark = pytest.mark.slurm


def preflight_job(sandbox: SandboxInfo, node: FakeNode, *argv: str) -> tuple[dict[str, Any], str]:
    """`janus-cluster preflight demo` on both nodes of the sandbox, judged as h800-ib: (report, log)."""
    write_tiny_data(node.folder / "demo_data")
    sets = [
        f"preflight.sysfs_root={node.root}",
        f"environment.setup=['export PATH={node.bin}:$PATH']",
        "preflight.min_free_gb=0.1",
        "preflight.command_timeout_s=3",
    ]
    options = [word for value in sets for word in ("--set", value)]
    command = ["preflight", "demo", "--nodes", "2", "--cluster", "sandbox", "--profile", "h800-ib", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "janus_cluster.cli", *command, *options, *argv],
        cwd=node.folder,
        env=os.environ | {"JANUS_HOME": str(Path(sandbox.home).parent), "DEMO_DATA": "demo_data"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    report: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == report["exit_code"], done.stderr
    return report, done.stderr


def with_room(node: FakeNode) -> FakeNode:
    """/dev/shm of the stand-in is as large as its disk, whatever the machine of the tests has."""
    (node.root / "dev" / "shm").mkdir(parents=True)
    return node


def faults(report: dict[str, Any], node: str) -> dict[str, str]:
    """Faults of the pretend hardware and its software; limits are the test machine's own."""
    return {
        r["id"]: r["measured"]
        for r in report["nodes"][node]
        if r["state"] in ("FAIL", "ERROR") and r["id"].startswith(("hca", "gpu", "reported", "versions"))
    }


def test_each_fault_is_attributed_to_its_own_node(sandbox: SandboxInfo, tmp_path: Path) -> None:
    node = with_room(h800_node(tmp_path, ports=sound_ports()).write())
    here = 'here=$(dirname "$0")\n'
    write_program(
        node.bin / "ibstat",
        f'#!/bin/sh\n{here}case "$SLURMD_NODENAME" in\n'
        'h800-02) sed "/\'mlx5_5\'/,/Link layer/s/Rate: 400/Rate: 200/" "$here/ibstat.txt" ;;\n'
        '*) cat "$here/ibstat.txt" ;;\nesac\n',
    )
    (node.bin / "nvidia-smi").rename(node.bin / "nvidia-smi.sound")
    write_program(
        node.bin / "nvidia-smi",
        f"#!/bin/sh\n{here}trap '' TERM\n"
        '[ "$SLURMD_NODENAME" != h800-01 ] || while :; do sleep 60; done\n'
        'exec "$here/nvidia-smi.sound" "$@"\n',
    )
    report, log = preflight_job(sandbox, node)
    assert (report["verdict"], report["exit_code"]) == ("FAIL", 2), log
    assert list(faults(report, "h800-01")) == ["gpu.count"]
    assert "did not answer" in faults(report, "h800-01")["gpu.count"]
    assert set(faults(report, "h800-02")) == {"hca.ibstat", "hca.agree"}
    assert "mlx5_5:1 200" in faults(report, "h800-02")["hca.ibstat"]
    assert report["exclude"] == ["h800-02"]


def test_a_node_without_a_rail_ends_the_job_before_any_bandwidth_is_measured(
    sandbox: SandboxInfo, tmp_path: Path
) -> None:
    node = with_room(h800_node(tmp_path, ports=sound_ports()[1:]).write())
    report, log = preflight_job(sandbox, node)
    assert report["exit_code"] == 2, log
    for name in ("h800-01", "h800-02"):
        assert "7 of 8" in faults(report, name)["hca.rails"]
        assert not [r for r in report["nodes"][name] if r["phase"] == "active"]
    assert report["exclude"] == ["h800-01", "h800-02"]
