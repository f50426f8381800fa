"""What of the submitter's shell reaches sbatch: nothing that another job left, nothing that overrides the script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from janus_cluster.run.paths import RunDir
from janus_cluster.slurm.commands import Slurm
from janus_cluster.slurm.sbatch_answer import Queued
from janus_cluster.slurm.submission import left_by_another_job, overriding, submit_run

SCRIPT = """#!/bin/bash
#SBATCH --time=24:00:00
#SBATCH --gres=gpu:h800:8
#SBATCH --requeue
#SBATCH --exclusive
#SBATCH --export=NONE
"""


def test_what_an_interactive_job_left_in_the_shell_is_distinguished_from_the_clients_own() -> None:
    shell = {
        **{"SLURM_JOB_ID": "5", "SLURM_CPU_BIND": "quiet,mask_cpu:0x3", "SLURM_MEM_PER_CPU": "4096"},
        **{"SLURM_CONF": "/etc/slurm.conf", "SLURM_CLUSTERS": "gpu", "SBATCH_ACCOUNT": "lab", "PATH": "/bin"},
    }
    assert left_by_another_job(shell) == ["SLURM_CPU_BIND", "SLURM_JOB_ID", "SLURM_MEM_PER_CPU"]


def test_outside_of_a_job_slurms_variables_are_the_users_own() -> None:
    assert left_by_another_job({"SLURM_HINT": "nomultithread", "SLURM_CONF": "/etc/slurm.conf"}) == []


@pytest.mark.parametrize(
    ("variable", "is_left_aside"),
    [
        ("SBATCH_TIMELIMIT", True),
        ("SBATCH_GRES", True),
        ("SBATCH_GPUS", True),
        ("SBATCH_GPUS_PER_NODE", True),
        ("SBATCH_NO_REQUEUE", True),
        ("SBATCH_EXPORT", True),
        ("SBATCH_OUTPUT", True),
        ("SBATCH_ARRAY_INX", True),
        ("SBATCH_WAIT", True),
        ("SBATCH_ACCOUNT", False),
        ("SBATCH_PARTITION", False),
        ("SBATCH_MEM_PER_NODE", False),
        ("SBATCH_RESERVATION", False),
    ],
)
def test_a_variable_that_contradicts_the_script_is_not_passed_on(variable: str, is_left_aside: bool) -> None:
    assert overriding({variable: "1", "OTHER": "1"}, SCRIPT) == ([variable] if is_left_aside else [])


def test_memory_is_asked_for_in_one_way() -> None:
    assert overriding({"SBATCH_MEM_PER_CPU": "4G"}, SCRIPT + "#SBATCH --mem=0\n") == ["SBATCH_MEM_PER_CPU"]


def test_sbatch_sees_neither_and_the_shell_keeps_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = tmp_path / "seen.json"
    for name in ("sbatch", "srun"):
        program = tmp_path / name
        program.write_text(
            f"#!{sys.executable}\nimport json, os\njson.dump(dict(os.environ), open({str(seen)!r}, 'w'))\n"
            "print('Welcome to lab. Your last job 7 used 12 GPU hours.\\nSubmitted batch job 41 on cluster lab')\n"
        )
        program.chmod(0o755)
    run = RunDir(tmp_path / "run")
    run.bundle(1).path.mkdir(parents=True)
    run.bundle(1).job_sbatch.write_text(SCRIPT)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name, value in (("SLURM_JOB_ID", "5"), ("SLURM_CPU_BIND", "0x3"), ("SBATCH_TIMELIMIT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SBATCH_ACCOUNT", "lab")
    slurm = Slurm(conf=tmp_path / "slurm.conf")
    queued = submit_run(run.bundle(1), lambda: 0, folder=run.submitit, slurm=slurm, patience_s=0)
    assert queued == Queued("41", "lab")
    environ = json.loads(seen.read_text())
    assert not {"SLURM_JOB_ID", "SLURM_CPU_BIND", "SBATCH_TIMELIMIT"} & set(environ)
    assert (environ["SBATCH_ACCOUNT"], environ["SLURM_CONF"]) == ("lab", f"{tmp_path}/slurm.conf")
    assert "SBATCH_TIMELIMIT of this shell is not passed on" in capsys.readouterr().err
    assert os.environ["SLURM_CPU_BIND"] == "0x3"
    assert os.environ.get("SLURM_CONF") != f"{tmp_path}/slurm.conf"


@pytest.mark.slow
def test_the_lowest_submitit_that_is_supported_sends_the_same(tmp_path: Path) -> None:
    (wanted,) = [r for r in map(Requirement, requires("janus-cluster") or []) if r.name == "submitit"]
    (lowest,) = [s.version for s in wanted.specifier if s.operator == ">="]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "lowest")]
    subprocess.run([*install, f"submitit=={lowest}"], check=True, timeout=300)
    environ = os.environ | {"PYTHONPATH": str(tmp_path / "lowest")}
    seen = subprocess.run(
        [sys.executable, "-c", "import submitit; print(submitit.__version__)"],
        env=environ, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert seen.stdout.strip() == lowest
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", f"--basetemp={tmp_path / 'tests'}", __file__]
    done = subprocess.run(tests, env=environ, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
