"""`janus-cluster preflight` as users and scripts meet it: real processes, exit codes, JSON on stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from node_fixtures import FakeNode, FakePort, h800_node, smi_texts, sound_ports


def preflight(cwd: Path, *argv: str, path: Sequence[Path] = (), **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("NCCL_", "TORCH_", "OMP_", "CUDA_", "MODEL_"))}
    first = os.pathsep.join([*map(str, path), os.environ["PATH"]])
    return subprocess.run(
        [sys.executable, "-m", "janus_cluster.cli", "preflight", *argv],
        cwd=cwd,
        env=clean | {"JANUS_HOME": str(cwd / "home"), "PATH": first} | environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def local(node: FakeNode, *argv: str) -> dict[str, Any]:
    """--local --json as h800-ib: the report, after checking that its exit code is the process's."""
    # How much memory this machine lets a process lock is not what is tested.
    sets = (f"preflight.sysfs_root={node.root}", "preflight.thresholds.limits.memlock_gib.fail_below=0")
    options = [word for value in sets for word in ("--set", value)]
    done = preflight(node.folder, "--local", "--json", "--profile", "h800-ib", *options, *argv, path=[node.bin])
    report: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == report["exit_code"], done.stderr
    return report


@pytest.mark.slow
def test_a_faulty_host_is_reported_as_json_and_by_the_exit_code(tmp_path: Path) -> None:
    ports = sound_ports()
    ports[3] = FakePort("mlx5_3", state="Down", phys="Polling", rate=10)
    smi = smi_texts()
    smi["ecc"] = smi["ecc"].replace("4, 0, 0", "4, 2, 2")
    report = local(h800_node(tmp_path, ports=ports, smi=smi).write())
    assert list(report) == ["verdict", "exit_code", "nodes", "cross_node", "exclude"]
    assert (report["verdict"], report["exit_code"], report["exclude"]) == ("FAIL", 2, ["local-01"])
    found = {r["id"]: r for r in report["nodes"]["local-01"]}
    assert "mlx5_3:1" in found["hca.rails"]["measured"]
    assert "GPU 4: 2 uncorrected" in found["gpu.ecc"]["measured"]
    assert {i for i, r in found.items() if r["state"] == "FAIL"} <= {
        "hca.rails", "hca.ibstat", "gpu.ecc", "limits.shm", "limits.shm_free", "limits.tmp", "limits.nofile",
    }  # fmt: skip
    assert list(report["nodes"]["local-01"][0]) == [
        "id", "phase", "node", "state", "measured", "expected", "unit", "threshold_source", "fix", "duration_s",
        "blames_node",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_table_of_a_faulty_host_shows_the_fault_and_how_to_mend_it(tmp_path: Path) -> None:
    node = h800_node(tmp_path, ports=[FakePort(f"mlx5_{i}") for i in range(7)]).write()
    argv = ["--local", "--set", f"preflight.sysfs_root={node.root}"]
    done = preflight(tmp_path, *argv, path=[node.bin])
    assert done.returncode == 2
    assert done.stdout.index("FAIL") < done.stdout.index("PASS")
    assert "hca.rails" in done.stdout
    assert "mend" in done.stdout
    assert "--exclude=local-01" in done.stdout


@pytest.mark.train
def test_a_hung_nvidia_smi_alone_is_undetermined_and_nothing_is_started_on_the_gpus(tmp_path: Path) -> None:
    hung = {"nvidia-smi": "#!/bin/sh\ntrap '' TERM\nwhile :; do sleep 60; done\n"}
    node = h800_node(tmp_path, programs=hung).write()
    (node.root / "dev" / "shm").mkdir(parents=True)
    report = local(node, "--set", "preflight.command_timeout_s=1.5")
    assert (report["verdict"], report["exit_code"], report["exclude"]) == ("ERROR", 3, [])
    results = report["nodes"]["local-01"]
    assert [(r["id"], r["state"]) for r in results if r["state"] == "ERROR"] == [("gpu.count", "ERROR")]
    assert {r["phase"] for r in results} == {"static"}


@pytest.mark.train
def test_this_host_passes_as_a_rehearsal(tmp_path: Path) -> None:
    done = preflight(tmp_path, "--local", "--json", "--profile", "cpu")
    report = json.loads(done.stdout)
    assert (report["verdict"], done.returncode) in (("PASS", 0), ("WARN", 1)), done.stderr
    states = {r["id"]: r["state"] for r in report["nodes"]["local-01"]}
    assert (states["gpu"], states["hca"]) == ("SKIP", "SKIP")
    assert states["all_reduce"] == "PASS"


def test_lint_env_of_a_clean_shell_is_silent_and_0(tmp_path: Path) -> None:
    done = preflight(tmp_path, "--lint-env")
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing doubtful" in done.stdout


def test_lint_env_shows_what_the_shell_and_the_job_hold(tmp_path: Path) -> None:
    legacy = ("--set", "environment.profile=janusvln-legacy")
    done = preflight(tmp_path, "--lint-env", *legacy, NCCL_IB_HCAA="mlx5", CUDA_LAUNCH_BLOCKING="1")
    assert done.returncode == 1
    assert "did you mean NCCL_IB_HCA" in done.stdout
    assert "NCCL_NTHREADS=640 (templates/env/janusvln-legacy.yaml)" in done.stdout
    assert not (tmp_path / "home").exists(), "nothing is submitted"


def test_lint_env_as_json(tmp_path: Path) -> None:
    done = preflight(tmp_path, "--lint-env", "--json", OMP_NUM_THREADS="0", TORCH_NCCL_ENABLE_MONITORING="0")
    value = json.loads(done.stdout)
    assert (value["exit_code"], done.returncode) == (1, 1)
    assert any("TORCH_NCCL_ENABLE_MONITORING=0 (this shell)" in w for w in value["warnings"])


def test_an_unknown_profile_lists_the_known_ones(tmp_path: Path) -> None:
    done = preflight(tmp_path, "--local", "--profile", "h900")
    assert done.returncode == 2
    assert "h800-ethernet" in done.stderr
