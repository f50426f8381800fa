"""A pretended node is judged the same whatever torch, CUDA and other packages are installed beside the tests.

Tests of pretended hardware run once more with a Python whose metadata names a torch 9.9.9 for CUDA 13.9, a transformers
and a deepspeed out of every range. What runs is the real torch: only what is read of it is another.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest
from node_fixtures import write_packages

ROOT = Path(__file__).parents[2]
OTHER = {"torch": "9.9.9+cu139", "transformers": "99.0.0", "deepspeed": "99.0.0", "nvidia-nccl-cu13": "9.9.9"}
# Imported, it makes way for the real one.
TORCH = """
import importlib, pathlib, sys
sys.path.remove(str(pathlib.Path(__file__).parents[1]))
del sys.modules["torch"]
importlib.import_module("torch")
"""
HERE = "tests/preflight"


@pytest.fixture(scope="module")
def other_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that finds OTHER first, and behind it everything that this one has."""
    folder = tmp_path_factory.mktemp("other") / "venv"
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    write_packages(packages, OTHER, cuda="13.9")
    (packages / "torch" / "__init__.py").write_text(TORCH)
    found = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    lines = [f"import site; site.addsitedir({path!r})\n" for path in found]
    (packages / "behind.pth").write_text("".join(lines))
    return folder / "bin" / "python"


def run(argv: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)


def test_the_other_software_is_what_is_read_and_not_what_is_run(other_python: Path) -> None:
    code = (
        "from janus_cluster.preflight.sysfs import NodeRoot\n"
        "from janus_cluster.preflight.versions import read_versions\n"
        "facts = read_versions(NodeRoot.of(None)); print(facts['torch'], facts['cuda'], facts['nccl'], flush=True)"
    )
    assert run([str(other_python), "-c", code]).stdout == "9.9.9+cu139 13.9 9.9.9\n"
    done = run([str(other_python), "-c", "import torch; print(torch.ones(2).sum().item(), torch.__version__)"])
    assert done.stdout.startswith("2.0 "), done.stderr
    assert "9.9.9" not in done.stdout


@pytest.mark.slow
def test_facts_of_pretended_nodes_are_judged_the_same(other_python: Path, tmp_path: Path) -> None:
    judge_again(other_python, tmp_path, f"{HERE}/test_fault_matrix.py", f"{HERE}/test_gate.py")


@pytest.mark.train
def test_the_whole_gate_of_pretended_nodes_is_judged_the_same(other_python: Path, tmp_path: Path) -> None:
    real = f"{HERE}/test_fault_matrix_real.py::test"
    tests = [
        f"{real}_this_host_passes_where_it_has_no_fault",
        f"{real}_the_same_fault_is_found_on_this_host_alone[HCA down]",
        f"{real}_the_same_fault_is_found_on_this_host_alone[versions out of range]",
        f"{HERE}/test_preflight_command.py::test_a_hung_nvidia_smi_alone_is_undetermined_and_nothing_is_started_on_the_gpus",
    ]
    judge_again(other_python, tmp_path, *tests)


def judge_again(python: Path, folder: Path, *tests: str) -> None:
    """Those tests pass with that Python."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={folder / 'again'}"]
    done = run([str(python), "-m", "pytest", *options, *tests])
    assert done.returncode == 0, done.stdout + done.stderr
