"""The rooms stay apart: who may import whom, and what the login node must be able to do without torch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from selection import find_marks, selects_nothing

from tests.tiny_data import write_tiny_data

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "janus_cluster"


def test_import_contracts_hold() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_training_names_no_slurm_variable() -> None:
    found = [p for p in (PACKAGE / "training").rglob("*.py") if "SLURM_" in p.read_text(encoding="utf-8")]
    assert found == []


def test_no_shell_strings_and_no_killing_by_name() -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for word in ("shell=True", "os.system(", "pkill", "killall"):
            assert word not in text, f"{path}: {word}"


def test_only_rundir_knows_names_inside_a_run_folder() -> None:
    names = {"resolved.json", "ds_config.json", "metrics.jsonl", "submission.json", "batch.log"}
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).as_posix() in ("run/paths.py", "job/home.py"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        assert not strings & names, f"{path} spells {strings & names}; ask RunDir"


def without_torch(tmp_path: Path, *argv: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The module `argv` in a Python where torch, transformers and deepspeed cannot be imported."""
    blocker = tmp_path / "sitecustomize.py"
    blocker.write_text(
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers', 'deepspeed', 'safetensors'):\n"
        "            raise ImportError(f'{name} is not to be imported on a login node')\n"
        "sys.meta_path.insert(0, Block())\n"
    )
    environ = os.environ | {"PYTHONPATH": str(tmp_path), "JANUS_HOME": str(tmp_path / "home")}
    return subprocess.run(
        [sys.executable, "-m", *argv],
        cwd=cwd or tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_and_dry_run_work_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    write_tiny_data(tmp_path / "demo_data")
    assert without_torch(tmp_path, "janus_cluster.cli", "--help").returncode == 0
    done = without_torch(tmp_path, "janus_cluster.cli", "submit", "demo", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "home" / "runs").iterdir())) == 1


def test_the_demo_data_generator_works_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    probe = "import sys; sys.path.insert(0, '.'); import sitecustomize, janus_cluster.janusvln.world.demo"
    without_torch(tmp_path, "janus_cluster.cli", "--help")
    done = subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


FAST = "not slurm and not train and not slow"


@pytest.mark.slow
def test_fast_tests_are_collected_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    done = without_torch(tmp_path, "pytest", "--collect-only", "-qq", "-p", "no:cacheprovider", "-m", FAST, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/janusvln/test_data_episodes.py" in done.stdout
    assert "tests/janusvln/test_loss.py" not in done.stdout


@pytest.mark.parametrize("selection", [[], ["-m", "train"], ["-m", "not slow"], ["-m", "slow"]])
def test_a_selected_file_that_needs_torch_is_an_error_without_it(tmp_path: Path, selection: list[str]) -> None:
    argv = ["pytest", "--collect-only", "-qq", "-p", "no:cacheprovider", *selection, "tests/janusvln/test_loss.py"]
    done = without_torch(tmp_path, *argv, cwd=ROOT)
    assert done.returncode == 2
    assert "torch is not to be imported on a login node" in done.stdout


@pytest.mark.parametrize(
    ("expression", "marks", "expected"),
    [
        (FAST, {"train"}, True),
        (FAST, set(), False),
        ("", {"train"}, False),
        ("slow", {"train"}, False),
        ("not slow", {"train"}, False),
        ("train", {"train"}, False),
        ("slurm and not train", {"train"}, True),
        ("slow or not train", {"train"}, False),
        ("not (train or slow)", {"train", "slow"}, True),
    ],
)
def test_a_file_is_left_out_only_where_no_test_of_it_can_be_selected(
    expression: str, marks: set[str], expected: bool
) -> None:
    assert selects_nothing(expression, marks) is expected


def test_only_plain_marks_of_a_file_are_read(tmp_path: Path) -> None:
    file = tmp_path / "test_file.py"
    for text, marks in [
        ("pytestmark = pytest.mark.train", {"train"}),
        ("pytestmark = [pytest.mark.slow, pytest.mark.train]", {"slow", "train"}),
        ("pytestmark = pytest.mark.train if GPU else pytest.mark.slow", set()),
        ("def test_one():\n    pytestmark = pytest.mark.train", set()),
    ]:
        file.write_text(text)
        assert find_marks(file) == marks, text
