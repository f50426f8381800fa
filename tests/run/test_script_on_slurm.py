"""What the real sbatch and slurmd make of rendered scripts."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.job.resources import jobs_dir
from janus_cluster.run.bundle import render_bundles, run_written
from janus_cluster.run.manifest import collect_manifest
from janus_cluster.run.paths import RunDir
from janus_cluster.sandbox import SandboxInfo, down, up

pytestmark = pytest.mark.slurm

Resolve = Callable[..., ResolvedJob]
HOSTILE = [
    "two words", "it's", 'echo "hi"', "back\\slash", "a\\\\b\\", "$(x) `y`", "a;b|c&d", "#no #comment", "日本 ü",
    "100%j",
]  # fmt: skip


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxInfo]:
    home = tmp_path_factory.mktemp("sandbox")
    yield up(home, mode="plain")
    down(home)


def _slurm(sandbox: SandboxInfo, *argv: str, **environ: str) -> str:
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=600, env=os.environ | sandbox.env() | environ, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def _write(resolved: ResolvedJob) -> Path:
    run = RunDir(Path(resolved.run_dir))
    manifest = collect_manifest(jobs_dir() / "demo.yaml", code={})
    bundles = render_bundles(resolved, job_yaml_text="", secrets={}, manifest=manifest)
    with run_written(run, bundles, code={}):
        return run.links.job_sbatch


@pytest.mark.parametrize("comment", HOSTILE)
def test_a_hostile_option_arrives_at_slurm_as_it_is(
    comment: str, sandbox: SandboxInfo, resolve: Resolve, tmp_path: Path
) -> None:
    resolved = resolve(run_dir=tmp_path / "r", sets=["slurm.hold=true"])
    options = resolved.sbatch_options | {"comment": comment}
    script = _write(resolved.model_copy(update={"sbatch_options": options}))
    job_id = _slurm(sandbox, "sbatch", "--parsable", str(script))
    try:
        shown = _slurm(sandbox, "scontrol", "show", "job", job_id)
    finally:
        _slurm(sandbox, "scancel", job_id)
    found = re.search(r"^ *Comment=(.*?) *$", shown, re.MULTILINE)
    assert found and found.group(1) == comment
    assert "gpu:h800:8" in shown and "NumNodes=2" in shown


@pytest.mark.parametrize("folder", ["plain", "two words", "it's 100%j", 'a"b', "$(touch pwned)", "ünï 日本", "#x"])
def test_by_hand_the_script_logs_to_its_run_folder_and_its_steps_get_its_environment(
    folder: str, sandbox: SandboxInfo, resolve: Resolve, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    # In place of the interpreter: as the attempt would, it starts a step and looks at what the step was given.
    python.write_text(
        '#!/bin/bash\n[ "$1" = -c ] || srun -N2 bash -c \'echo "step: $DS_ACCELERATOR/${STRAY-unset}"\'\n'
    )
    python.chmod(0o755)
    resolved = resolve("demo", run_dir=tmp_path / folder / "r", python=str(python))
    script = _write(resolved)
    _slurm(sandbox, "sbatch", "--wait", str(script), STRAY="leaked")
    log = (script.parent / "logs" / "batch.log").read_text()
    assert log.count("step: cpu/unset") == 2, log
    assert not list(tmp_path.rglob("pwned"))


def test_where_nodes_cannot_fetch_an_environment_the_shell_is_taken_along(
    sandbox: SandboxInfo, resolve: Resolve, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/bash\n[ "$1" = -c ] || srun -N2 bash -c \'echo "step: $DS_ACCELERATOR/${STRAY-unset}"\'\n'
    )
    python.chmod(0o755)
    resolved = resolve("demo", run_dir=tmp_path / "r", python=str(python), sets=["slurm.export=ALL"])
    script = _write(resolved)
    _slurm(sandbox, "sbatch", "--wait", str(script), STRAY="mine")
    log = (script.parent / "logs" / "batch.log").read_text()
    assert log.count("step: cpu/mine") == 2, log
