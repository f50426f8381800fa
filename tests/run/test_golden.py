"""What every shipped job renders to, word for word. After a wanted change: UPDATE_GOLDEN=1 pytest tests/render."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.job.resources import jobs_dir
from janus_cluster.run.bundle import render_env_of
from janus_cluster.run.sbatch import render_sbatch

GOLDEN = Path(__file__).parent / "golden"
JOBS = sorted(path.stem for path in jobs_dir().glob("*.yaml"))
# Every shipped job as it is, and the one for several nodes on another number of them.
CASES = [*((job, None) for job in JOBS), ("train_2node", 4)]


@pytest.fixture
def rendered(request: pytest.FixtureRequest, resolve: Callable[..., ResolvedJob]) -> dict[str, str]:
    job, nodes = request.param
    case = job if nodes is None else f"{job}.on_{nodes}_nodes"
    resolved = resolve(
        job,
        sets=[] if nodes is None else [f"nodes={nodes}"],
        run_dir=Path(f"/shared/runs/{job}-20260101T000000Z-abcd"),
        environ={"WANDB_API_KEY": "not-in-any-file"},
        python="/opt/janus/bin/python",
    ).model_copy(update={"janus_version": "VERSION"})
    return {
        f"{case}.job.sbatch": render_sbatch(resolved),
        f"{case}.env.sh": render_env_of(resolved),
        f"{case}.ds_config.json": json.dumps(resolved.ds_config, indent=2) + "\n",
    }


def test_there_are_shipped_jobs() -> None:
    assert set(JOBS) >= {"train_1node", "train_2node", "preflight", "demo"}


@pytest.mark.parametrize("rendered", CASES, indirect=True)
def test_shipped_job_renders_to_its_golden_files(rendered: dict[str, str]) -> None:
    for name, text in rendered.items():
        path = GOLDEN / name
        if os.environ.get("UPDATE_GOLDEN") == "1":
            path.write_text(text, encoding="utf-8")
        assert path.read_text(encoding="utf-8") == text, f"{name} changed; if that is wanted: UPDATE_GOLDEN=1 pytest"


@pytest.mark.parametrize("rendered", CASES, indirect=True)
def test_scripts_of_shipped_jobs_pass_bash_and_shellcheck(
    rendered: dict[str, str], shellcheck: str, tmp_path: Path
) -> None:
    for name, text in rendered.items():
        if name.endswith(".json"):
            continue
        script = tmp_path / name
        script.write_text(text, encoding="utf-8")
        for argv in (["bash", "-n", str(script)], [shellcheck, str(script)]):
            done = subprocess.run(argv, capture_output=True, text=True, timeout=600, check=False)
            assert done.returncode == 0, done.stdout + done.stderr


def test_no_golden_file_is_left_over_from_a_removed_job() -> None:
    assert {path.name.split(".")[0] for path in GOLDEN.iterdir()} == set(JOBS)
