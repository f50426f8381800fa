"""What of the GPU benchmark a CPU can prove: which levers run, what is kept when one fails, that memory comes back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import chosen_levers, extrapolate, parse_arguments
from benchmarks.gpu_measure import count_launches

pytestmark = pytest.mark.train

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("gpu_worker.py")


def names(*arguments: str) -> list[str]:
    return [lever.name for lever in chosen_levers(parse_arguments(arguments))]


def test_a_dash_chooses_no_lever_though_names_hold_dashes() -> None:
    assert any("-" in name for name in names())
    assert names("--levers", "-") == []
    assert names("--levers", "-", "--predecessor") == ["everything (off: the predecessor)"]
    assert names("--levers", "crop", "head") == ["head on label positions", "crop"]
    assert names("--compile", "--levers", "compiled") == ["VGGT not compiled (off: compiled)"]


def test_zero_3_comes_last_because_its_memory_does_not_come_back() -> None:
    assert [name for name in names() if "ZeRO-3" in name] == names()[-1:]


def test_every_kind_of_launch_is_counted_and_nothing_else() -> None:
    seen = [
        ("cudaLaunchKernel", 5), ("cudaLaunchKernelExC", 4), ("cuLaunchKernelEx", 3),
        ("cudaLaunchCooperativeKernel", 2), ("cudaGraphLaunch", 1), ("cudaMemcpyAsync", 100), ("aten::mm", 100),
        ("void cutlass::Kernel2<…>", 100),
    ]  # fmt: skip
    assert count_launches(seen, cuda=True) == 15
    assert count_launches(seen, cuda=False) == 100


def test_extrapolation_is_a_line_through_two_numbers_of_layers() -> None:
    assert extrapolate(0.2, 0.3, layers=(7, 14), whole=28) == pytest.approx(0.5)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("gpu") / "found.json"
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [sys.executable, str(WORKER), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    read: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return read


def test_an_engines_memory_comes_back_before_the_next_is_built(found: dict[str, Any]) -> None:
    assert found["gone"] == {"1": True, "2": True}


def test_what_fails_is_named_saved_and_costs_nothing_else(found: dict[str, Any]) -> None:
    assert found["problems"]["unbuildable"].startswith("not built: FileNotFoundError")
    assert found["problems"]["ours"].startswith("ValueError: num_workers")
    (left_out,) = found["left_out"]
    assert left_out.startswith("afterwards: ours: ValueError")
    # Each result was written as soon as it was there.
    assert found["saved"] == [1, 2]
