"""What a rehearsal makes of a job, and which jobs and options it refuses before anything is written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from janus_cluster.desk.rehearse import Watch, shorten
from janus_cluster.desk.submit import Request, load_request, submit
from janus_cluster.errors import RehearsalFailed, UsageError
from janus_cluster.job.schema import JobConfig
from tests.tiny_data import write_tiny_data

ENVIRON = {"MODEL_PATH": "/m", "VGGT_MODEL_PATH": "/v", "DATA_ROOT": "/d"}


def short(job: str = "train_2node", *sets: str, name: str | None = None) -> JobConfig:
    return load_request(shorten(Request(job=job, sets=sets, name=name), ENVIRON), ENVIRON).config


def test_a_rehearsal_is_the_same_job_for_a_few_steps() -> None:
    given = load_request(Request(job="train_2node"), ENVIRON).config
    config = short()
    assert config.name == f"{given.name}-rehearsal"
    assert config.training.max_steps == config.checkpoint.every_steps == 6
    assert not config.checkpoint.export
    assert config.training.evaluate_every_steps is None
    assert config.data.validation_fraction == 0
    assert config.slurm["time"] == "60"
    same = ("model", "hardware", "environment", "preflight", "deepspeed", "restart", "nodes")
    assert all(getattr(config, part) == getattr(given, part) for part in same)
    for key in ("per_device_batch_size", "gradient_accumulation_steps", "learning_rate", "precision", "tune", "seed"):
        assert getattr(config.training, key) == getattr(given.training, key)


def test_the_users_own_length_and_walltime_win() -> None:
    config = short("train_2node", "training.max_steps=50", "slurm.time=00:20:00", "training.logging_steps=10")
    assert config.training.max_steps == config.checkpoint.every_steps == 50
    assert config.slurm["time"] == "00:20:00"
    assert config.training.logging_steps == 1, "every step must be seen"


def test_a_long_name_is_cut_to_what_slurm_takes() -> None:
    name = short(name="n" * 64).name
    assert len(name) == 64
    assert name.endswith("n-rehearsal")


@pytest.mark.parametrize(
    ("sets", "expected_text"),
    [
        (["kind=preflight"], "only training"),
        (["restart.on_stop=end"], r"restart\.on_stop"),
        (["checkpoint.resume=never"], r"checkpoint\.resume"),
        (["training.max_steps=3"], r"training\.max_steps: 3"),
    ],
)
def test_a_job_that_could_not_go_on_is_refused(sets: list[str], expected_text: str) -> None:
    with pytest.raises(UsageError, match=expected_text):
        short("train_2node", *sets)


@pytest.mark.parametrize("option", ["--dry-run", "--follow"])
def test_it_is_refused_beside_options_that_contradict_it(option: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "janus_cluster.cli", "submit", "demo", "--rehearse", option],
        cwd=tmp_path,
        env=os.environ | {"JANUS_HOME": str(tmp_path / "home"), "DEMO_DATA": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--rehearse" in done.stderr
    assert not (tmp_path / "home").exists()


def test_a_job_without_news_is_left_alone_after_a_while(tmp_path: Path) -> None:
    request = Request(job="demo", dry_run=True, sets=["training.max_steps=6"])
    environ = {"JANUS_HOME": str(tmp_path), "DEMO_DATA": str(write_tiny_data(tmp_path / "data"))}
    lines: list[str] = []
    watch = Watch(submit(request, environ=environ, cwd=tmp_path), lines.append, longest_silence_s=0.2)
    with pytest.raises(RehearsalFailed, match="nothing new of job") as caught:
        watch.wait_until(lambda: False)
    assert "janus-cluster cancel" in (caught.value.hint or "")


@pytest.mark.slow
def test_ctrl_c_leaves_the_job_and_reports_it(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "janus_cluster.cli"]
    environ = os.environ | {"JANUS_HOME": str(tmp_path / "home"), "DEMO_DATA": str(write_tiny_data(tmp_path / "data"))}
    waiting = ("--nodes", "1", "--set", "environment.setup=[sleep 60]")
    rehearsal = subprocess.Popen(
        [*argv, "submit", "demo", "--cluster", "local", "--rehearse", *waiting],
        cwd=tmp_path,
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert rehearsal.stdout is not None
    job_id = ""
    for line in rehearsal.stdout:
        if "RUNNING" in line:
            job_id = line.split()[1].rstrip(":")
            break
    try:
        rehearsal.send_signal(signal.SIGINT)
        reported = rehearsal.stdout.read()
        assert rehearsal.wait(30) == 130
        assert "its job goes on" in reported
        assert "next: janus-cluster status demo-rehearsal-" in reported
        os.kill(int(job_id.removeprefix("local-")), 0)
    finally:
        rehearsal.stdout.close()
        done = subprocess.run(
            [*argv, "cancel", job_id, "--yes"], cwd=tmp_path, env=environ, capture_output=True, check=False
        )
    assert done.returncode == 0, done.stderr
