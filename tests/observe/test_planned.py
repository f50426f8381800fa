"""The planned step beside the measured one, of runs as submit and training leave them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from run_files import append_metric_line

from janus_cluster.cli.plan import make_plan
from janus_cluster.job.load import load_job
from janus_cluster.job.resolve import resolve_job
from janus_cluster.job.resources import jobs_dir
from janus_cluster.observe.planned import describe_plan
from janus_cluster.observe.progress import Progress
from janus_cluster.observe.status import RunStatus, add_plan, collect_status
from janus_cluster.run.files import write_json_atomically, write_text_atomically
from janus_cluster.run.paths import RunDir

NODES = ("h800-01", "h800-02")


def make_run(tmp_path: Path, *sets: str, step_time_s: float | None = 20.0) -> RunDir:
    """A finished two-node run of the shipped job, three steps logged."""
    run = RunDir(tmp_path / "runs" / "train-20261121-aaaa")
    run.bundle(1).path.mkdir(parents=True)
    (tmp_path / "data").mkdir(exist_ok=True)
    environ = {"MODEL_PATH": "/m", "VGGT_MODEL_PATH": "/v", "DATA_ROOT": str(tmp_path / "data")}
    loaded = load_job(jobs_dir() / "train_2node.yaml", sets=sets, environ=environ, options={})
    resolved = resolve_job(
        loaded, run_dir=run.path, cluster="slurm", environ=environ, cwd=tmp_path, python=sys.executable
    )
    write_text_atomically(run.bundle(1).resolved_json, resolved.model_dump_json())
    write_json_atomically(run.submission_json, {"cluster": "slurm", "job_id": "7", "submitted_at": time.time() - 9})
    word = {"cluster": "slurm", "job_id": "7", "attempt": 1, "nodes": list(NODES), "state": "COMPLETED"}
    write_json_atomically(run.status_json, word | {"exit_code": 0, "updated_at": time.time()})
    run.begin_attempt()
    for step in (1, 2, 3) if step_time_s is not None else ():
        record = {"kind": "train", "attempt": 1, "step": step, "total_steps": 3, "loss": 1.0}
        ranks = {"data_wait_s": [0.1] * 16, "visual_tokens": [9000] * 16}
        append_metric_line(run, record | {"step_time_s": step_time_s, "samples_per_s": 6.0, "ranks": ranks})
    return run


def planned(run: RunDir) -> RunStatus:
    return add_plan(collect_status([run])[0])


def see_gpus(run: RunDir, name: str) -> None:
    rows = [{"index": str(i), "name": name} for i in range(8)]
    for node in NODES:
        write_json_atomically(run.facts_json(1, node), {"gpu": {"identity": {"rows": rows}}})


def test_a_run_shows_the_figure_of_the_command_plan(tmp_path: Path) -> None:
    status = planned(make_run(tmp_path))
    environ = {"MODEL_PATH": "/m", "VGGT_MODEL_PATH": "/v", "DATA_ROOT": "/d"}
    made = make_plan("train_2node", nodes=None, sets=(), gpu_name=None, samples=None, environ=environ)
    assert status.plan_step_time_s == pytest.approx(made.as_it_is.time.total)
    assert status.to_json()["plan_step_time_s"] == status.plan_step_time_s


@pytest.mark.parametrize("sets", [("hardware.gpu_type=b300",), ("hardware.gpu_type=''",), ("kind=preflight",)])
def test_no_other_gpus_figure_is_used_for_one_that_plan_does_not_know(tmp_path: Path, sets: tuple[str, ...]) -> None:
    assert planned(make_run(tmp_path, *sets)).plan_step_time_s is None


def test_a_run_on_the_cpu_has_no_plan(tmp_path: Path) -> None:
    sets = ("hardware.device=cpu", "environment.profile=cpu", "hardware.processes_per_node=8")
    assert planned(make_run(tmp_path, *sets)).plan_step_time_s is None


def test_a_run_that_has_logged_no_step_has_no_plan(tmp_path: Path) -> None:
    assert planned(make_run(tmp_path, step_time_s=None)).plan_step_time_s is None


def test_the_gpus_that_the_gate_saw_win_over_the_name_of_the_gres(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    asked = planned(run).plan_step_time_s
    see_gpus(run, "NVIDIA H800")
    assert planned(run).plan_step_time_s == asked
    see_gpus(run, "NVIDIA H200")
    seen = planned(run).plan_step_time_s
    assert seen is not None
    assert seen != asked
    for foreign in ("NVIDIA GH200 480GB", "NVIDIA A100-SXM4-80GB"):
        see_gpus(run, foreign)
        assert planned(run).plan_step_time_s is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"job": {"kind": "train", "hardware": {"device": "cuda"}}}'])
def test_a_damaged_resolved_job_has_no_plan(tmp_path: Path, text: str) -> None:
    run = make_run(tmp_path)
    run.bundle(1).resolved_json.write_text(text)
    assert planned(run).plan_step_time_s is None


def describe(measured_s: float, planned_s: float | None, **ranks: Any) -> list[str]:
    return describe_plan(Progress(median_step_time_s=measured_s, ranks=ranks), planned_s, job_file="/r/job.yaml")


def test_the_plan_is_shown_beside_the_measured_step() -> None:
    assert describe(7.4, 6.9) == ["s/step 7.40 (median of the last logged), plan 6.90 (+7%)"]
    assert describe(7.4, None) == []


def test_only_a_step_slower_by_more_than_a_quarter_names_what_to_look_at() -> None:
    assert len(describe(12.5, 10.0)) == 1
    assert len(describe(5.0, 10.0)) == 1
    _, line = describe(12.6, 10.0, data_wait_s=(0.1, 6.3))
    assert "waiting for data is 50% of the step" in line
    assert "janus-cluster plan /r/job.yaml" in line
    assert "docs/troubleshooting.md" in line
    assert "waiting for data is only 1% of the step" in describe(12.6, 10.0, data_wait_s=(0.1, 0.05))[1]


def test_without_gpus_status_does_not_import_plan(tmp_path: Path) -> None:
    run = make_run(tmp_path, "hardware.device=cpu", "environment.profile=cpu", "hardware.processes_per_node=8")
    code = (
        "import sys\nfrom janus_cluster.cli.main import cli\n"
        f"cli.main(['status', {str(run.path)!r}], standalone_mode=False)\n"
        "loaded = [m for m in sys.modules if m.startswith('janus_cluster.plan')]\n"
        "sys.exit(str(loaded) if loaded else 0)"
    )
    env = os.environ | {"JANUS_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
