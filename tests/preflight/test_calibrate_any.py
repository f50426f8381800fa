"""preflight --calibrate where no shipped profile fits, as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from node_fixtures import FakeNode, smi_texts

pytestmark = pytest.mark.train

# One GPU's worth of everything, over gloo: what a machine without GPUs can measure.
SMALL = (
    "hardware.device=cpu",
    "environment.profile=cpu",
    "preflight.profile=any",
    "preflight.min_free_gb=0",
    "preflight.thresholds.all_reduce.backend=gloo",
    "preflight.thresholds.all_reduce.payload_mb=4",
    "preflight.thresholds.gemm.size=256",
    "preflight.thresholds.gemm.dtype=float32",
    "preflight.thresholds.limits.memlock_gib.warn_below=0",
    "preflight.thresholds.limits.memory_gib.warn_below=0",
    "preflight.thresholds.limits.nofile={warn_below: 1, fail_below: 1}",
    "preflight.thresholds.limits.shm_gib.fail_below=0",
    "preflight.thresholds.limits.shm_free_gib.fail_below=0",
)


def test_a_site_that_no_profile_fits_is_calibrated_and_then_judged_by_that(tmp_path: Path) -> None:
    """GPUs of a part without figures are pretended by nvidia-smi; the probe is real."""
    node = FakeNode(tmp_path / "node", smi={k: v.replace("NVIDIA H800", "NVIDIA X1") for k, v in smi_texts().items()})
    node.write()
    environ = node.environ() | {"JANUS_HOME": str(tmp_path / "home")}
    (tmp_path / "model").mkdir()

    def gate(*argv: str) -> tuple[dict[str, Any], str]:
        sets = [*SMALL, f"preflight.sysfs_root={node.root}", f"environment.setup=['export PATH={node.bin}:$PATH']"]
        options = [word for value in sets for word in ("--set", value)]
        command = [sys.executable, "-m", "janus_cluster.cli", "preflight", "--local", "--json", *options, *argv]
        done = subprocess.run(
            command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False, timeout=600
        )
        assert done.stdout, done.stderr
        rows = {r["id"]: r for of_node in json.loads(done.stdout)["nodes"].values() for r in of_node}
        return rows, done.stderr

    unfit, err = gate("--set", "preflight.profile=h800-ib", "--calibrate")
    assert unfit["gpu.model"]["state"] == "FAIL"
    assert "not calibrated" in err and "--profile any --calibrate" in err
    first, err = gate("--calibrate")
    assert (first["site.kind"]["state"], "baseline written" in err) == ("WARN", True), (first["site.kind"], err)
    written = json.loads((tmp_path / "home/site/baseline.json").read_text())["profiles"]["any, 1 node"]["measured"]
    assert {"all_reduce", "gemm"} <= set(written)
    # A hundredth of the baseline would be a fault, and so would this run be beside a hundred times as much.
    path = tmp_path / "home/site/baseline.json"
    path.write_text(path.read_text().replace(f'"gemm": {written["gemm"]}', f'"gemm": {100 * written["gemm"]}'))
    later, _ = gate()
    assert later["site.kind"]["state"] == "PASS"
    assert (later["gemm"]["state"], "baseline of this site" in later["gemm"]["threshold_source"]) == ("FAIL", True)
