"""Other code or other packages than were submitted are reported at the start of an attempt, or refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from janus_cluster.job.resources import jobs_dir
from janus_cluster.node.code import compare_versions
from janus_cluster.run.files import read_json, write_json_atomically
from janus_cluster.run.manifest import collect_manifest
from janus_cluster.run.paths import RunDir
from janus_cluster.run.snapshot import read_package, write_package

_PROGRAM = """
import sys; from pathlib import Path
from janus_cluster.job.load import load_job
from janus_cluster.job.resolve import resolve_job
from janus_cluster.errors import UsageError
from janus_cluster.node.code import check_code
from janus_cluster.run.paths import RunDir
run = RunDir(Path(sys.argv[1]))
loaded = load_job(Path(sys.argv[2]), sets=sys.argv[3:], environ={})
resolved = resolve_job(loaded, run_dir=run.path, cluster="local", environ={}, cwd=run.path, python=sys.executable)
try:
    print(*check_code(run, resolved, attempt=run.begin_attempt()), sep="\\n")
except UsageError as e:
    sys.exit(f"{e.message}\\nnext: {e.hint}")
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run folder with a manifest of the code of this moment, and a copy of that code beside it."""
    run = RunDir(tmp_path / "run")
    run.bundle(1).path.mkdir(parents=True)
    code = read_package()
    collect_manifest(jobs_dir() / "demo.yaml", code=code).write(run.bundle(1).manifest_json)
    write_package(code, tmp_path / "installed")
    return run


def check(run: RunDir, *sets: str) -> subprocess.CompletedProcess[str]:
    """check_code as an attempt calls it, in a process that imports the copy."""
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(run.path), str(jobs_dir() / "demo.yaml"), *sets],
        cwd=run.path,
        env=os.environ | {"PYTHONPATH": str(run.path.parent / "installed")},
        capture_output=True,
        text=True,
        check=False,
    )


def append(run: RunDir, name: str, text: str) -> None:
    with (run.path.parent / "installed" / "janus_cluster" / name).open("a") as f:
        f.write(text)


@pytest.mark.slow
def test_the_same_code_is_not_worth_a_word(run: RunDir) -> None:
    done = check(run, "environment.on_code_change=fail")
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.mark.slow
def test_changed_code_is_reported_or_refused_and_the_files_are_named(run: RunDir) -> None:
    append(run, "janusvln/loss.py", "\n# another line\n")
    done = check(run)
    assert done.returncode == 0, done.stderr
    (output,) = done.stdout.splitlines()
    for word in ("has changed since it was submitted", "1 file differs", "janusvln/loss.py", str(run.path.parent)):
        assert word in output
    refused = check(run, "environment.on_code_change=fail")
    assert refused.returncode == 1
    for word in ("janusvln/loss.py", "environment.on_code_change: fail", "next: ", "janus-cluster resume"):
        assert word in refused.stderr


def test_packages_that_changed_since_the_first_attempt_are_named(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert compare_versions(run, attempt=run.begin_attempt()) is None
    assert compare_versions(run, attempt=run.begin_attempt()) is None
    first = read_json(run.versions_json(1))
    write_json_atomically(run.versions_json(1), first | {"pydantic": "1.0", "deepspeed": None, "gone": "7"})
    output = compare_versions(run, attempt=run.begin_attempt())
    assert output is not None and output.startswith("versions changed since attempt 1: ")
    assert f"pydantic 1.0 → {first['pydantic']}" in output
    assert "gone 7 → none" in output
    assert "python" not in output


def test_a_first_attempt_without_versions_is_passed_over(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.begin_attempt()
    number = run.begin_attempt()
    assert compare_versions(run, attempt=number) is None
    assert read_json(run.versions_json(number))["python"]
