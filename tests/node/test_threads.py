"""OMP_NUM_THREADS of the ranks follows the CPUs that the node gives."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from janus_cluster.job.load import load_job
from janus_cluster.job.resolve import resolve_job
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.job.resources import jobs_dir
from janus_cluster.node.threads import thread_variables

PATHS = {"MODEL_PATH": "/m", "VGGT_MODEL_PATH": "/v", "DATA_ROOT": "/d"}


def resolved(folder: Path, *sets: str) -> ResolvedJob:
    """Eight ranks, for which the profile has eight threads each."""
    loaded = load_job(jobs_dir() / "train_1node.yaml", sets=[*sets, f"preflight.sysfs_root={folder}"], environ=PATHS)
    return resolve_job(loaded, run_dir=folder, cluster="slurm", environ={}, cwd=folder, python=sys.executable)


def threads(job: ResolvedJob, **environ: str) -> Sequence[str]:
    planned = {var.name: var.value for var in job.env}
    return [var.value for var in thread_variables(job, planned | environ)]


def give_cpus(folder: Path, count: int) -> None:
    group = folder / "sys" / "fs" / "cgroup" / "job_7"
    group.mkdir(parents=True)
    (folder / "proc" / "self").mkdir(parents=True)
    (folder / "proc" / "self" / "cgroup").write_text("0::/job_7\n")
    (group / "cpu.max").write_text(f"{count * 100_000} 100000\n")


def test_one_cpu_for_eight_ranks_gives_each_one_thread(tmp_path: Path) -> None:
    give_cpus(tmp_path, 1)
    job = resolved(tmp_path)
    assert threads(job) == ["1"]
    (variable,) = thread_variables(job, {var.name: var.value for var in job.env})
    assert variable.reason == "Lowered from 8: 1 CPU for 8 ranks."


def test_cpus_are_shared_among_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(128)))
    give_cpus(tmp_path, 24)
    assert threads(resolved(tmp_path)) == ["3"]


def test_enough_cpus_leave_the_profiles_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(128)))
    assert threads(resolved(tmp_path)) == []


@pytest.mark.parametrize("sets", [[], ["environment.variables.OMP_NUM_THREADS=8"]])
def test_a_value_of_the_users_is_kept(tmp_path: Path, sets: list[str]) -> None:
    give_cpus(tmp_path, 1)
    own = {} if sets else {"OMP_NUM_THREADS": "6"}
    assert threads(resolved(tmp_path, *sets), **own) == []
