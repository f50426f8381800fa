"""Jobs for the rendering tests go through the real loader and resolver; only their places are made up."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from janus_cluster.config.load import load_job
from janus_cluster.config.resolve import resolve_job
from janus_cluster.config.schema import ResolvedJob
from janus_cluster.plan.auto import plan_memory_keys
from janus_cluster.resources import jobs_dir

ENVIRON = {"MODEL_PATH": "/models/qwen", "VGGT_MODEL_PATH": "/models/vggt", "DATA_ROOT": "/data/r2r"}

Resolve = Callable[..., ResolvedJob]


@pytest.fixture
def resolve() -> Resolve:
    """A shipped job, resolved for a run folder and an environment that the test chooses."""

    def resolved(
        job: str = "train_2node",
        *,
        run_dir: Path = Path("/shared/runs/r"),
        sets: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        python: str = sys.executable,
    ) -> ResolvedJob:
        everything = ENVIRON | dict(environ or {})
        loaded, memory = plan_memory_keys(load_job(jobs_dir() / f"{job}.yaml", sets=sets, environ=everything))
        return resolve_job(
            loaded,
            run_dir=run_dir,
            cluster="slurm",
            environ=everything,
            cwd=Path("/shared"),
            python=python,
            memory=memory,
        )

    return resolved


@pytest.fixture(scope="session")
def shellcheck() -> str:
    """The program; its absence is a failure, because an unchecked script is what this guards against."""
    found = shutil.which("shellcheck")
    if found is None:
        pytest.fail("shellcheck is not installed: apt-get install shellcheck")
    return found
