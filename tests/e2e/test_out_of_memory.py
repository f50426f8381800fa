"""training.memory: auto on this machine, where memory really runs out: a process may not have more of it.

The limit is set from what a rank of the smaller option was seen to have, so that it leaves room for whatever the
libraries map: 0.26 GB for torch's CPU build and 0.8 GB for its CUDA 13 build, before any tensor.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from run_files import read_metric_lines

from janus_cluster.janusvln.world.demo import write_demo_episodes
from janus_cluster.run.current import current_bundle
from janus_cluster.run.files import read_json
from janus_cluster.run.paths import RunDir

pytestmark = pytest.mark.train

# Two ranks, 32 samples a step: 16×1 is the fastest under ZeRO-3 and needs 0.45 GB more than 4×4, which follows it.
JOB = """
name: memory
hardware: {gpus_per_node: 0, processes_per_node: 2, device: cpu, gpu_memory_gb: 8}
environment: {profile: cpu, setup: ["${LIMIT:-true}"]}
preflight: {enabled: false}
model: {preset: tiny}
data: {roots: [demo_data], history: 4, image_width: 336, min_pixels: 784, num_workers: 0, validation_fraction: 0}
training:
  memory: auto
  per_device_batch_size: 16
  gradient_accumulation_steps: 1
  max_steps: 2
  precision: fp32
  tune: {vision: true}
checkpoint: {every_steps: 100, export: false}
restart: {on_failure: never}
"""
SETS = ("deepspeed.profile=zero3", "training.gradient_checkpointing=false")
SMALLER = (
    "training.memory=manual", "training.per_device_batch_size=4", "training.gradient_accumulation_steps=4",
)  # fmt: skip
# What a rank's memory may be seen too low by, because it is looked at now and then.
MARGIN_KB = 200_000
Train = Callable[..., tuple[RunDir, int]]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Runs the job to its end. Returns: its folder, and the most memory (kB) that a rank was seen to have."""
    folder = tmp_path_factory.mktemp("memory")
    write_demo_episodes(folder / "demo_data", num_episodes=8, seed=0, image_size=(160, 120))
    (folder / "job.yaml").write_text(JOB)

    def call(*sets: str, limit_kb: int | None = None) -> tuple[RunDir, int]:
        options = [word for text in (*SETS, *sets) for word in ("--set", text)]
        limit = {} if limit_kb is None else {"LIMIT": f"ulimit -d {limit_kb}"}
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "janus_cluster.cli",
                "submit",
                "job.yaml",
                "--cluster",
                "local",
                "--json",
                *options,
            ],
            cwd=folder,
            env=os.environ | {"JANUS_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"} | limit,
            capture_output=True,
            text=True,
            check=True,
            timeout=600,
        )
        run = RunDir(Path(json.loads(done.stdout)["run_dir"]))
        most_kb, deadline = 0, time.monotonic() + 300
        while not (run.status_json.exists() and read_json(run.status_json)["phase"] == "done"):
            assert time.monotonic() < deadline, run.batch_log.read_text()
            most_kb = max(most_kb, most_data_kb(run))
            time.sleep(0.02)
        return run, most_kb

    return call


@pytest.fixture(scope="module")
def smaller(train: Train) -> tuple[RunDir, int]:
    """The smaller option's run, without a limit, and a limit (kB) under which it fits and the larger one does not."""
    run, most_kb = train(*SMALLER)
    assert len(losses(run)) == 2
    return run, most_kb + MARGIN_KB


def most_data_kb(run: RunDir) -> int:
    """VmData of the largest rank of the run, as the kernel limits it with RLIMIT_DATA."""
    found = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode(errors="replace")
            if (
                str(run.path) in command
                and "janus_cluster.training" in command
                and "torch.distributed.run" not in command
            ):
                lines = (process / "status").read_text().split("\n")
                found = max(found, *(int(line.split()[1]) for line in lines if line.startswith("VmData")), 0)
        except OSError:
            continue
    return found


def losses(run: RunDir) -> list[float]:
    return [record["loss"] for record in read_metric_lines(run) if record["kind"] == "train"]


def test_the_first_step_runs_out_of_memory_and_a_smaller_option_trains_the_same(
    train: Train, smaller: tuple[RunDir, int]
) -> None:
    manual, limit_kb = smaller
    run, _ = train(limit_kb=limit_kb)
    output = run.batch_log.read_text()
    status = read_json(run.status_json)
    assert (status["state"], status["attempt"]) == ("COMPLETED", 2), output
    assert "can't allocate memory" in output
    assert "memory: one more attempt in the same allocation with zero3, batch 4×4" in output
    assert "attempt 1 (zero3, batch 16×1, recompute none) ran out of memory before its first step" in output

    first, second = (read_json(run.attempt_json(attempt)) for attempt in (1, 2))
    assert (first["state"], first["memory"]["option"], second["memory"]["option"]) == ("FAILED", 0, 1)
    assert "continues with zero3, batch 4×4" in first["reason"]
    assert "ran out of memory" in second["memory"]["because"]
    assert (first["bundle"], first["fallback"]["bundle"], second["bundle"]) == (1, 2, 2)
    assert (second["fallback"], current_bundle(run).number) == (None, 2)
    job = read_json(run.bundle(2).resolved_json)["job"]["training"]
    assert (job["per_device_batch_size"], job["gradient_accumulation_steps"]) == (4, 4)
    assert losses(run) == losses(manual)
    assert {record["attempt"] for record in read_metric_lines(run) if record["kind"] == "train"} == {2}
    # A CPU has no peak that could be compared with the plan.
    assert not [record for record in read_metric_lines(run) if record["kind"] == "memory"]


def test_after_the_last_option_the_job_has_failed_and_the_card_has_the_reason(
    train: Train, smaller: tuple[RunDir, int]
) -> None:
    _, limit_kb = smaller
    run, _ = train("training.per_device_batch_size=16", limit_kb=limit_kb)
    status = read_json(run.status_json)
    output = run.batch_log.read_text()
    assert (status["state"], status["exit_code"], status["attempt"]) == ("FAILED", 12, 1), output
    assert "the last option of training.memory: auto" in status["reason"]
    done = subprocess.run(
        [sys.executable, "-m", "janus_cluster.cli", "status", str(run.path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert "host_out_of_memory" in done.stdout
