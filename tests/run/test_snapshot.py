"""The copy of the package: the same from a checkout, a wheel and a run folder, and importable on its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from janus_cluster.run.snapshot import hash_package, read_package, write_package


def ask(folder: Path, program: str) -> str:
    """What `program` prints where janus_cluster comes from `folder`."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd="/",
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_what_nodes_read_is_there_and_the_reference_numbers_are_not() -> None:
    files = read_package()
    assert {"__init__.py", "node/attempt.py", "training/entry.py", "_data/templates/env/nccl_variables.txt"} <= set(
        files
    )
    assert not [name for name in files if "vectors/" in name or "__pycache__" in name or name.startswith("_data/jobs")]
    assert sum(map(len, files.values())) < 3e6, "every run folder holds a copy"


@pytest.mark.slow
def test_a_copy_runs_on_its_own_and_a_copy_of_it_has_the_same_hash(tmp_path: Path) -> None:
    files = read_package()
    write_package(files, tmp_path / "code")
    program = (
        "import janus_cluster.node.attempt; from janus_cluster.job.templates import load_nccl_variable_names;"
        "from janus_cluster.run.snapshot import PACKAGE, hash_package, read_package;"
        "assert load_nccl_variable_names(); print(PACKAGE, hash_package(read_package()))"
    )
    output = ask(tmp_path / "code", program).split()
    assert output == [str(tmp_path / "code" / "janus_cluster"), hash_package(files)]


@pytest.mark.parametrize("change", [{"loss.py": b"2"}, {"new.py": b""}, {"loss.py": b"1", "entry.py": None}])
def test_every_change_changes_the_hash(change: dict[str, bytes | None]) -> None:
    files = {"loss.py": b"1", "entry.py": b"e"}
    changed = {name: data for name, data in {**files, **change}.items() if data is not None}
    assert hash_package(changed) != hash_package(files)


def test_the_copy_is_no_link_to_what_is_installed(tmp_path: Path) -> None:
    write_package(read_package(), tmp_path / "code")
    assert {p.stat().st_nlink for p in tmp_path.rglob("*.py")} == {1}
