"""Running DeepSpeed engines do what is in their JSON: every key, every shipped profile, one process and two."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed
import pytest
from engine_values import ROWS, WITHOUT_EFFECT, leaves
from training_run import write_run_folder

from janus_cluster.janusvln.world.demo import write_demo_episodes
from janus_cluster.job import deepspeed as rendering
from janus_cluster.job.resources import jobs_dir, templates_dir
from janus_cluster.run.paths import RunDir

pytestmark = pytest.mark.train

WORKER = Path(__file__).with_name("engine_values_worker.py")
PROFILES = sorted(path.stem for path in (templates_dir() / "deepspeed").glob("*.json"))
DEVICES = ("cuda", "cpu")
ACCUMULATION = 2
# In the JSON of the shell scripts.
OLD_KEYS = {"comms_logger": {"enabled": False}, "steps_per_print": 10, "timers": {}}
# Where ZeRO itself waits for the device: after a micro-step's reductions, and for the small weights of ZeRO-3.
REDUCED = "stage_1_and_2.py:independent_gradient_partition_epilogue"
GATHERED = "partition_parameters.py:_allgather_params_coalesced"
LOGGED = "comm.py:log_wrapper"
# Synchronisations of each micro-step of an optimizer step.
SYNCHRONISATIONS: dict[str, list[dict[str, int]]] = {
    "zero0": [{}, {}],
    "zero1": [{}, {REDUCED: 1}],
    "zero2": [{REDUCED: 1}, {REDUCED: 1}],
    "zero2_offload": [{REDUCED: 1}, {REDUCED: 1}],
    "zero3": [{}, {GATHERED: 1}],
}


def job_for(profile: str, device: str, *, processes: int, root: Path, steps: int = 1) -> dict[str, Any]:
    gpus = processes if device == "cuda" else 0
    return {
        "nodes": 1,
        "model": {"preset": "tiny"},
        "data": {"roots": [str(root / "demo")], "history": 0, "image_width": 84, "min_pixels": 784, "num_workers": 0},
        "training": {
            "max_steps": steps, "precision": "bf16", "per_device_batch_size": 1,
            "gradient_accumulation_steps": ACCUMULATION,
        },
        "deepspeed": {"profile": profile},
        "hardware": {"device": device, "gpus_per_node": gpus, "processes_per_node": processes},
        "environment": {"profile": "h800-ib" if device == "cuda" else "cpu"},
    }  # fmt: skip


def with_changes(job: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The job with another value for every key of its DeepSpeed JSON that can have one."""
    stage = config["zero_optimization"]["stage"]
    present = {key for key, _ in leaves(config)} | {"comms_logger.enabled"}
    present |= {"zero_optimization.offload_param.device"} if stage == 3 else set()
    changed = json.loads(json.dumps(job))
    # One thing after the other: without the optimizer on the host nothing is pinned there.
    left_out = {"zero_optimization.offload_optimizer.device"}
    for key in present & set(ROWS) - left_out:
        for job_key, value in ROWS[key].change.items():
            section, _, name = job_key.partition(".")
            if name.startswith("overrides."):
                changed[section].setdefault("overrides", {})[name.removeprefix("overrides.")] = value
            else:
                changed[section][name] = value
    return changed


def torchrun(folders: list[Path], out: Path, *, processes: int) -> dict[str, Any]:
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--rdzv-backend=c10d"]
    command = [sys.executable, *launch, "--rdzv-endpoint=127.0.0.1:0", str(WORKER), str(out), *map(str, folders)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(RunDir(folder).bundle(1).ds_config_json.read_text(encoding="utf-8"))
    return config


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engines")
    write_demo_episodes(path / "demo", num_episodes=4, seed=1, image_size=(160, 120))
    return path


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, Any]:
    """One process: live values of every profile, for GPUs and for CPUs."""
    folders = []
    for profile in PROFILES:
        for device in DEVICES:
            folder = root / f"1-{profile}-{device}"
            write_run_folder(folder, job_for(profile, device, processes=1, root=root))
            folders.append(folder)
    return torchrun(folders, root / "alone.json", processes=1)


@pytest.fixture(scope="module")
def together(root: Path) -> dict[str, Any]:
    """Two processes: the same, every profile with other values, and ZeRO-2 with the old JSON's key."""
    old = root / "2-zero2-old"
    # Three steps: DeepSpeed's throughput timer leaves out two.
    write_run_folder(old, job_for("zero2", "cuda", processes=2, root=root, steps=3))
    RunDir(old).bundle(1).ds_config_json.write_text(json.dumps(read_config(old) | OLD_KEYS), encoding="utf-8")
    folders = [old]
    for profile in PROFILES:
        for device in DEVICES:
            folder = root / f"2-{profile}-{device}"
            job = job_for(profile, device, processes=2, root=root, steps=3 if device == "cuda" else 1)
            write_run_folder(folder, job)
            folders.append(folder)
        shipped = job_for(profile, "cuda", processes=2, root=root)
        folder = root / f"2-{profile}-changed"
        write_run_folder(folder, with_changes(shipped, read_config(root / f"2-{profile}-cuda")))
        folders.append(folder)
    return torchrun(folders, root / "together.json", processes=2)


@pytest.fixture
def engines(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(("engines", "processes"), [("alone", 1), ("together", 2)], indirect=["engines"])
def test_an_engine_runs_with_every_value_of_its_shipped_json(
    engines: dict[str, Any], processes: int, profile: str, device: str, root: Path
) -> None:
    name = f"{processes}-{profile}-{device}"
    shipped = dict(leaves(read_config(root / name)))
    assert set(shipped) - set(ROWS) == set(), "shipped, and engine_values.py has no reader for it"
    assert engines[name]["values"] == shipped


@pytest.mark.parametrize("profile", PROFILES)
def test_an_engine_runs_with_every_value_that_a_job_changes(together: dict[str, Any], profile: str, root: Path) -> None:
    shipped = dict(leaves(read_config(root / f"2-{profile}-cuda")))
    changed = dict(leaves(read_config(root / f"2-{profile}-changed")))
    assert together[f"2-{profile}-changed"]["values"] == changed
    same = {key for key, value in shipped.items() if changed[key] == value}
    fixed = {"fp16.enabled", "zero_optimization.stage", "zero_force_ds_cpu_optimizer"}
    assert same <= fixed | {"zero_optimization.offload_optimizer.device"}


@pytest.mark.parametrize("profile", PROFILES)
def test_a_micro_step_waits_for_the_device_only_where_zero_must(together: dict[str, Any], profile: str) -> None:
    micro_steps = together[f"2-{profile}-cuda"]["micro_steps"]
    # With the first step the counts of building the engine.
    assert micro_steps[ACCUMULATION:] == 2 * SYNCHRONISATIONS[profile]


def test_the_old_json_waits_after_every_collective_and_for_a_timer(together: dict[str, Any]) -> None:
    old = together["2-zero2-old"]
    assert old["values"]["comms_logger.enabled"] is True, "the JSON has false"
    for micro_step, shipped in zip(old["micro_steps"][-ACCUMULATION:], SYNCHRONISATIONS["zero2"], strict=True):
        places = set(micro_step)
        assert places >= {LOGGED, "timer.py:start"} and micro_step[REDUCED] == shipped[REDUCED]
    last = old["micro_steps"][-1]
    assert last["timer.py:stop"] == 1 and last[LOGGED] > 5


def test_keys_that_the_docs_call_dead_are_dead(together: dict[str, Any]) -> None:
    assert together["2-zero2-old"]["prints_every"] is None, "accelerate replaces steps_per_print"
    sources = [path.read_text(encoding="utf-8") for path in Path(deepspeed.__file__).parent.glob("runtime/**/*.py")]
    assert not any("zero_allgather_partitions()" in source for source in sources), "read again: give it a row"
    assert {"steps_per_print", "zero_optimization.allgather_partitions"} == WITHOUT_EFFECT


def test_every_documented_deepspeed_key_has_a_row() -> None:
    known = rendering.INTEGER_KEYS | rendering.SWITCH_KEYS | rendering.SECTION_KEYS | rendering.OTHER_KEYS
    rows = {part for key in {*ROWS, *WITHOUT_EFFECT} for part in key.split(".")}
    top = Path(__file__).parents[2]
    pages = [*top.glob("README*.md"), *top.glob("docs/*.md"), *jobs_dir().glob("*.yaml")]
    documented = {word for page in pages for word in re.findall(r"[a-z0-9_]+", page.read_text(encoding="utf-8"))}
    assert "reduce_bucket_size" in documented & known
    assert documented & known <= rows
