"""preflight --calibrate, as a user types it: the baseline is written and the next job carries it to its nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.train


def test_a_calibrated_site_judges_later_jobs_by_its_baseline(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    environ = os.environ | {"JANUS_HOME": str(tmp_path / "home")}

    def call(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "janus_cluster.cli", *argv]
        return subprocess.run(
            command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False, timeout=600
        )

    gate = ("--local", "--profile", "cpu", "--set", "preflight.min_free_gb=0")
    done = call("preflight", *gate, "--calibrate", "--json")
    assert done.returncode in (0, 1), done.stderr
    assert "baseline written" in done.stderr
    written = json.loads((tmp_path / "home/site/baseline.json").read_text())["profiles"]["cpu, 1 node"]
    assert set(written["measured"]) == {"all_reduce", "gemm"}
    assert (tmp_path / "home/site/history/local-01.jsonl").read_text().count("\n") == 1
    sets = ("--set", "kind=preflight", "--set", "preflight.min_free_gb=0", "--set", "data.roots=[]")
    later = call("submit", "demo", "--nodes", "1", "--dry-run", "--json", *sets)
    assert later.returncode == 0, later.stderr
    resolved = json.loads((Path(json.loads(later.stdout)["run_dir"]) / "resolved.json").read_text())
    assert resolved["preflight_thresholds"]["baseline"]["measured"] == written["measured"]
