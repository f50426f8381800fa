"""nvidia-smi's samples while the probe runs: the link's generation and the clocks, judged over all samples."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from node_fixtures import NUM, h800_node, smi_texts

from janus_cluster.node.bracket import run_between_counters
from janus_cluster.preflight.gpu_load import judge_gpu_load
from janus_cluster.preflight.gpu_query import LOAD, parse_table
from janus_cluster.run.records.verdict import CheckResult

PROFILE = {"pcie_width_min": 16, "pcie_generation": 5, "source": "test"}
TEXT = smi_texts()["load"]
ROW = "3, P0, 5, 5, 16, 1755, 1980, 0x0000000000000004, 5"


def sample(text: str = TEXT, **more: Any) -> dict[str, Any]:
    return {**parse_table(text, LOAD[0]), "problem": None, "error": None, **more}


def with_row(row: str) -> dict[str, Any]:
    assert ROW in TEXT
    return sample(TEXT.replace(ROW, row))


def judged(samples: list[dict[str, Any]] | None) -> dict[str, CheckResult]:
    results = judge_gpu_load(samples, PROFILE, node="h800-02", gpus_per_node=NUM)
    assert {(r.node, r.phase) for r in results} == {("h800-02", "active")}
    return {r.id: r for r in results}


IDLE = with_row("3, P8, 1, 5, 16, 210, 1980, 0x0000000000000001, 5")


@pytest.mark.parametrize(
    ("samples", "pcie", "throttle", "word"),
    [
        ([sample()], "PASS", "PASS", "8 GPUs, 1 samples, SM clock up to 1755 MHz"),
        # Idle at first, as every GPU: the best generation counts.
        ([IDLE, sample()], "PASS", "PASS", "2 samples"),
        ([IDLE], "WARN", "PASS", "GPU 3: generation 1 of 5, but never seen in P0"),
        ([IDLE, with_row("3, P0, 3, 5, 16, 1755, 1980, 0x4, 5")], "FAIL", "PASS", "GPU 3: generation 3 of 5 in P0"),
        # One slot of generation 4: its link is as fast as the slot allows, and slower than the GPU.
        ([with_row("3, P0, 4, 4, 16, 1755, 1980, 0x4, 5")], "FAIL", "PASS", "GPU 3: generation 4 of 5: the slot"),
        # A driver that does not know the GPU's own generation: the profile's counts.
        ([with_row("3, P0, 4, 4, 16, 1755, 1980, 0x4, [N/A]")], "FAIL", "PASS", "GPU 3: generation 4 of 5: the slot"),
        # A host of generation 4 is another kind of machine, not a broken GPU.
        ([sample(TEXT.replace("P0, 5, 5, 16", "P0, 4, 4, 16"))], "WARN", "PASS", "generation 4 of 5: the slot"),
        ([with_row("3, [GPU requires reset], 5, 5, 16, 1755, 1980, 0x4, 5")], "FAIL", "PASS", "GPU requires reset"),
        # The narrowest moment counts.
        ([sample(), with_row("3, P0, 5, 5, 8, 1755, 1980, 0x4, 5")], "FAIL", "PASS", "GPU 3: x8"),
        (
            [sample(), with_row("3, P0, 5, 5, 16, 900, 1980, 0x0000000000000040, 5")],
            "PASS",
            "FAIL",
            "HW thermal slowdown",
        ),
        ([with_row("3, P0, 5, 5, 16, 1200, 1980, 0x2, 5")], "PASS", "WARN", "application clocks setting"),
        ([with_row("3, P0, [N/A], 5, 16, 1755, 1980, 0x4, 5")], "ERROR", "PASS", "generation not reported"),
        ([with_row("3, P0, 5, [N/A], 16, 1755, 1980, 0x4, 5")], "ERROR", "PASS", "generation not reported"),
        ([with_row("3, P0, 5, 5, 16, 1755, 1980, [Unknown Error], 5")], "PASS", "ERROR", "reasons not reported"),
        ([sample(TEXT.replace(ROW + "\n", ""))], "ERROR", "ERROR", "GPU 3: did not answer"),
        ([sample(), sample(error="nvidia-smi did not answer within 2 s")], "ERROR", "ERROR", "did not answer"),
        ([sample(problem="nvidia-smi ended with 15")], "ERROR", "ERROR", "ended with 15"),
        ([], "ERROR", "ERROR", "before nvidia-smi was queried"),
        (None, "ERROR", "ERROR", "was not queried"),
    ],
)
def test_the_load_is_judged_over_all_samples(
    samples: list[dict[str, Any]] | None, pcie: str, throttle: str, word: str
) -> None:
    found = judged(samples)
    assert (found["gpu.pcie_load"].state, found["gpu.throttle_load"].state) == (pcie, throttle)
    assert word in found["gpu.pcie_load"].measured + found["gpu.throttle_load"].measured
    assert all(r.fix for r in found.values() if r.state != "PASS")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sound", "hangs"])
def test_nvidia_smi_is_asked_while_the_probe_runs(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = {"nvidia-smi": "#!/bin/sh\nexec sleep 60\n"} if how == "hangs" else {}
    node = h800_node(tmp_path, programs=programs).write()
    monkeypatch.setenv("PATH", node.environ()["PATH"])
    command = [sys.executable, "-c", "import time; time.sleep(1.8)"]
    out = tmp_path / "counters.json"
    assert run_between_counters(command, os.environ, out, sysfs_root=str(node.root), gpu_timeout_s=0.5) == 0
    samples = json.loads(out.read_text())["gpu_load"]
    if how == "hangs":
        assert [s["error"] for s in samples] == ["nvidia-smi did not answer within 0.5 s"], "asked once"
    else:
        assert 2 <= len(samples) <= 4
        assert {r.state for r in judged(samples).values()} == {"PASS"}
