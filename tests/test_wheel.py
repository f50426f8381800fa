"""The wheel: what it holds, its version, and that it installs on a login node without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest

from janus_cluster import __version__
from tests.tiny_data import write_tiny_data

ROOT = Path(__file__).resolve().parent.parent


def call(argv: list[str], cwd: Path, **environ: str) -> str:
    done = subprocess.run(
        argv, cwd=cwd, env=os.environ | environ, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    call([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)], folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an empty venv into which only the built wheel and its login-node dependencies went."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    # The versions that these tests run with: a new release of a dependency is for `make test-newest` to find.
    pins = folder / "pins.txt"
    pins.write_text("".join(f"{d.name}=={d.version}\n" for d in distributions() if d.name != "janus-cluster"))
    install = ["install", "--quiet", "--disable-pip-version-check", "--constraint", str(pins), str(wheel)]
    call([str(python), "-m", "pip", *install], folder)
    return folder / "venv" / "bin"


@pytest.mark.slow
def test_the_wheel_is_typed_and_small_and_has_the_version_of_the_package(wheel: Path) -> None:
    assert wheel.name == f"janus_cluster-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {"janus_cluster/py.typed", "janus_cluster/_data/jobs/train_2node.yaml"} <= set(names)
    assert not [name for name in names if "vectors" in name or name.startswith("tests/")]
    assert wheel.stat().st_size < 1_000_000


@pytest.mark.train
def test_verify_core_of_a_wheel_shows_where_its_reference_numbers_are(installed: Path, tmp_path: Path) -> None:
    argv = [str(installed / "janus-cluster"), "verify-core"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "not in a wheel" in done.stderr
    assert "janus-cluster verify-core SOURCE/tests/vectors" in done.stderr
    # With a folder the next obstacle of this environment is named.
    done = subprocess.run([*argv, str(ROOT)], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600)
    assert "torch is not installed" in done.stderr


@pytest.mark.train
def test_the_wheel_submits_from_another_folder_without_torch(installed: Path, tmp_path: Path) -> None:
    frozen = call([str(installed / "python"), "-m", "pip", "list", "--format=json"], tmp_path)
    packages = {p["name"].lower() for p in json.loads(frozen)}
    assert "janus-cluster" in packages
    assert not packages & {"torch", "transformers", "deepspeed"}

    write_tiny_data(tmp_path / "demo_data")
    printed = call(
        [str(installed / "janus-cluster"), "submit", "demo", "--dry-run", "--json"], tmp_path, JANUS_HOME="home"
    )
    run_dir = Path(json.loads(printed)["run_dir"])
    assert (run_dir / "job.sbatch").exists()
    # The copy in the run folder comes before the installed wheel, finds its templates, and is the same code.
    program = (
        "from janus_cluster.job.templates import load_nccl_variable_names; from janus_cluster.run.snapshot import *;"
        "assert load_nccl_variable_names(); print(PACKAGE, hash_package(read_package()))"
    )
    printed = call([str(installed / "python"), "-c", program], tmp_path, PYTHONPATH=str(run_dir / "code"))
    code = json.loads((run_dir / "manifest.json").read_text())["code"]
    assert printed.split() == [str(run_dir / "code" / "janus_cluster"), code["sha256"]]
    assert "site-packages" in code["path"]
    resolved = json.loads((run_dir / "resolved.json").read_text())
    assert resolved["python"] == str(installed / "python")
    assert "site-packages" in resolved["origins"]["name"]
