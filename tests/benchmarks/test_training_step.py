"""The benchmarks of the training step at their smallest: what claims to be exact is, and every part of them runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.train

ROOT = Path(__file__).parents[2]


def run_benchmark(module: str, *arguments: str, out: Path) -> dict[str, Any]:
    """What the benchmark wrote as JSON."""
    command = [sys.executable, "-m", module, *arguments, "--json", str(out)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("benchmark") / "step.json"
    arguments = ("--size", "tiny", "--few", "--repeats", "1", "--accumulation", "1")
    return run_benchmark("benchmarks.training_step", *arguments, out=out)


def test_both_ways_of_a_lever_give_the_same_loss_and_gradient(measured: dict[str, Any]) -> None:
    exact = [row for row in measured["rows"] if row["exact"]]
    assert {row["lever"] for row in measured["rows"]} - {row["lever"] for row in exact} == {"everything", "crop"}
    for row in exact:
        assert row["loss_difference"] < 5e-6, row
        assert row["norm_difference"] < 1e-5, row
        # After the steps in between too: also what the optimizer made of the gradients is the same.
        assert row["later_loss_difference"] < 5e-5, row


def test_other_pixels_give_another_loss(measured: dict[str, Any]) -> None:
    (crop,) = (row for row in measured["rows"] if row["lever"] == "crop")
    assert crop["loss_difference"] > 1e-4


def test_what_can_be_counted_is_less_than_the_predecessors(measured: dict[str, Any]) -> None:
    ours, before = (measured["ways"][name]["counts_per_optimizer_step"] for name in ("ours", "predecessor"))
    assert 5 * ours["module_calls"] < before["module_calls"]
    assert 3 * ours["operators"] < before["operators"]
    # One wait in the model; DeepSpeed's optimizer asks for the rest, once in all micro-steps of a step.
    in_model = {place: count for place, count in ours["waits_at"].items() if "/model/" in f"/{place.split(' at ')[1]}"}
    assert sum(in_model.values()) == 1, in_model


def test_the_gpu_script_runs_to_its_end_on_a_cpu(tmp_path: Path) -> None:
    arguments = [
        "--size", "tiny", "--device", "cpu", "--steps", "1", "--warm-up", "1", "--pairs", "1", "--workers", "0",
        "--levers", "grouped", "ZeRO-3",
    ]  # fmt: skip
    found = run_benchmark("benchmarks.gpu", *arguments, out=tmp_path / "gpu.json")
    (network,) = found["networks"]
    assert found["finished"]
    assert not network["left_out"]
    assert [ratio["lever"] for ratio in network["ratios"]] == ["grouped windows", "ZeRO-2 (off: ZeRO-3)"]
    assert all(ratio["loss_difference"] < 5e-6 for ratio in network["ratios"])
    for result in network["results"]:
        assert result["problem"] is None
        assert result["unseen"] == []
        assert {"DINO", "VGGT", "ViT", "LLM forward", "backward", "optimizer"} <= result["parts_s"].keys()
        assert sum(result["parts_s"].values()) == pytest.approx(result["split_step_s"], rel=0.05)
        assert result["kernel_launches"] > 0
