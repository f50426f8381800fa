"""A checkpoint means the same to every number of processes and every ZeRO stage.

First number by number, on a small network whose sizes nothing divides; then as a user sees it: the loss curve of a run
that goes on with other processes and another stage is that of the run that was never interrupted.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from reshard_worker import MODEL_WEIGHTS, Network, names_of
from run_files import read_metric_lines
from training_run import CPU, all_output, free_port, run_on_nodes, write_run_folder

from janus_cluster.errors import UsageError
from janus_cluster.janusvln.world.demo import write_demo_episodes
from janus_cluster.modelspec.zero_cut import Cut
from janus_cluster.run.paths import RunDir
from janus_cluster.training.reshard import (
    MOMENTS,
    WEIGHT,
    load_source,
    load_states,
    require_same_parameters,
    written_cut,
)

pytestmark = pytest.mark.train

NAMES = names_of(Network())


def config(stage: int, *, bf16: bool = False, **zero: Any) -> dict[str, Any]:
    buckets = {"reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000, "overlap_comm": False}
    if stage == 3:
        # Some parameters persistent, some not.
        buckets |= {"stage3_prefetch_bucket_size": 1000, "stage3_param_persistence_threshold": 10}
    return {"zero_optimization": {"stage": stage} | buckets | zero, "bf16": {"enabled": bf16}}


CONFIGS = {
    "zero0": config(0),
    "zero1": config(1, parameter_alignment=True),
    "zero2": config(2, round_robin_gradients=True),
    "zero2 offload": config(2, offload_optimizer={"device": "cpu", "pin_memory": False}),
    "zero3": config(3),
    "zero3 in small groups": config(3, sub_group_size=40),
    "zero0 bf16": config(0, bf16=True),
    "zero2 bf16": config(2, bf16=True),
    "zero3 bf16": config(3, bf16=True),
}
# Each stage as the writer and as the reader.
CARRIED = [
    ("zero0", "zero3"), ("zero1", "zero0"), ("zero2", "zero3 in small groups"), ("zero3 in small groups", "zero1"),
    ("zero3", "zero2 offload"), ("zero2 offload", "zero2"), ("zero2 bf16", "zero3 bf16"), ("zero3 bf16", "zero0 bf16"),
    ("zero0 bf16", "zero2 bf16"),
]  # fmt: skip


def work_off(folder: Path, cases: list[dict[str, Any]], *, processes: int) -> None:
    plan = folder / f"plan{processes}.json"
    plan.write_text(json.dumps(cases), encoding="utf-8")
    worker = Path(__file__).with_name("reshard_worker.py")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
        "--master-port", str(free_port()), str(worker), str(plan),
    ]  # fmt: skip
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two processes under their configuration's name; of three, that loaded them, under both names."""
    folder = tmp_path_factory.mktemp("carried")
    written = [{"config": c, "from": None, "steps": 3, "out": str(folder / name)} for name, c in CONFIGS.items()]
    work_off(folder, written, processes=2)
    cases = [
        {"config": CONFIGS[to], "from": str(folder / begun), "steps": 0, "out": str(folder / f"{begun} to {to}")}
        for begun, to in CARRIED
    ]
    work_off(folder, cases, processes=3)
    return folder


def numbers(checkpoint: Path) -> dict[Any, Any]:
    """The content of a checkpoint, parameter by parameter."""
    source = load_source(checkpoint, names=NAMES)
    content: dict[Any, Any] = {"step": source.step, "counters": source.counters}
    content["groups"] = [
        {key: group[key] for key in ("name", "lr", "weight_decay", "betas")}
        for group in source.shards[0].torch_state["param_groups"]
    ]
    for name, pieces in source.layout.items():
        for key in (WEIGHT, *MOMENTS):
            content[name, key] = torch.full((sum(p.numel for p in pieces),), torch.nan)
            source.read(key, name, start=0, into=content[name, key])
    return content


@pytest.mark.parametrize(("begun", "to"), CARRIED)
def test_three_processes_hold_every_number_that_two_wrote(carried: Path, begun: str, to: str) -> None:
    expected, found = numbers(carried / begun), numbers(carried / f"{begun} to {to}")
    assert written_cut(carried / begun).world_size == 2
    assert written_cut(carried / f"{begun} to {to}") == Cut.of(CONFIGS[to], world_size=3)
    # DeepSpeed's ZeRO-0 in bf16 makes an update when the engine is built; the count is carried as it is.
    assert expected["step"] == (4 if begun == "zero0 bf16" else 3)
    assert len(expected) == 3 + 4 * 3
    assert expected["groups"][0]["weight_decay"] != expected["groups"][1]["weight_decay"]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert value.abs().sum() > 0, key
            assert torch.equal(found[key], value), key
        else:
            assert found[key] == value, key


@pytest.mark.parametrize(("begun", "to"), CARRIED)
def test_the_network_computes_with_the_weights_that_were_carried(carried: Path, begun: str, to: str) -> None:
    masters, weights = numbers(carried / begun), torch.load(carried / f"{begun} to {to}" / MODEL_WEIGHTS)
    for name, weight in weights.items():
        expected = masters[name, WEIGHT].view_as(weight)
        if "bf16" in to:
            assert not torch.equal(expected, weight), "the masters are finer"
            expected = expected.to(torch.bfloat16).float()
        assert torch.equal(weight, expected), name


def test_a_missing_part_is_refused_with_who_wrote_it(carried: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(carried / "zero3", tmp_path / "checkpoint")
    next(folder.rglob("*zero_pp_rank_1_*_optim_states.pt")).unlink()
    with pytest.raises(UsageError, match="written by 2 processes under ZeRO-3, but holds 0 files of rank 1"):
        load_source(folder, names=NAMES)


def test_an_enumeration_is_read_as_every_python_writes_it_and_nothing_else_is_looked_up(
    tmp_path: Path,
) -> None:
    class Lookup:
        def __init__(self, *arguments: Any) -> None:
            self._arguments = arguments

        def __reduce__(self) -> tuple[Any, ...]:
            return getattr, self._arguments

    def read(value: Any) -> Any:
        torch.save({"stage": value}, tmp_path / "states.pt")
        return load_states(tmp_path / "states.pt")["stage"]

    # Python 3.11.0 to 3.11.3 write what the second one writes.
    assert read(ZeroStageEnum.gradients) is read(Lookup(ZeroStageEnum, "gradients")) is ZeroStageEnum.gradients
    for looked_up in ((str, "upper"), (ZeroStageEnum, "mro"), (ZeroStageEnum, "__class__")):
        with pytest.raises(UsageError, match="cannot be read"):
            read(Lookup(*looked_up))


def test_a_part_of_another_size_is_refused(carried: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(carried / "zero3", tmp_path / "checkpoint")
    part = next((carried / "zero0 to zero3").rglob("*zero_pp_rank_1_*_optim_states.pt"))
    shutil.copy(part, next(folder.rglob("*zero_pp_rank_1_*_optim_states.pt")))
    with pytest.raises(UsageError, match=r"of rank 1 holds \d+ numbers, its parameters need") as refused:
        load_source(folder, names=NAMES)
    assert "deepspeed.profile=zero3" in str(refused.value.hint)


def test_a_checkpoint_of_other_parameters_is_refused_by_name(carried: Path) -> None:
    source = load_source(carried / "zero2", names=NAMES)
    sizes = {name: sum(p.numel for p in pieces) for name, pieces in source.layout.items()}
    require_same_parameters(source, sizes)
    with pytest.raises(UsageError, match=r"2 differ: adapter: not there, 3 here; last\.bias: 5 there, 6 here"):
        require_same_parameters(source, sizes | {"last.bias": 6, "adapter": 3})


EFFECTIVE_BATCH = 4
Topology = tuple[str, int, int]
"""DeepSpeed profile, nodes, processes on each."""
CHANGES: list[tuple[Topology, Topology]] = [
    (("zero3", 2, 1), ("zero2", 1, 1)),
    (("zero3", 2, 1), ("zero0", 1, 2)),
    (("zero2", 1, 1), ("zero3", 1, 2)),
    (("zero2", 1, 1), ("zero1", 1, 1)),
]


def job_of(episodes: Path, topology: Topology) -> dict[str, Any]:
    profile, nodes, processes = topology
    rows = 2
    return {
        "nodes": nodes,
        "hardware": CPU["hardware"] | {"processes_per_node": processes},
        "model": {"preset": "tiny"},
        "data": {
            "roots": [str(episodes)], "history": 1, "image_width": 84, "min_pixels": 784, "num_workers": 0,
            "validation_fraction": 0,
        },
        "training": {
            "per_device_batch_size": rows, "gradient_accumulation_steps": EFFECTIVE_BATCH // (rows * nodes * processes),
            "effective_batch_size": EFFECTIVE_BATCH, "max_steps": 6, "learning_rate": 3e-3, "precision": "fp32",
            "weight_decay": 0.1, "gradient_checkpointing": False,
        },
        "deepspeed": {"profile": profile},
        "checkpoint": {"every_steps": 3, "keep_last": 9, "export": False},
    }  # fmt: skip


@pytest.fixture(scope="module")
def episodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "demo"
    write_demo_episodes(root, num_episodes=4, seed=0, image_size=(160, 120))
    return root


@pytest.fixture(scope="module")
def whole_runs(episodes: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Topology], RunDir]:
    """Runs that were never interrupted, each made once: six steps, a checkpoint after the third."""

    @cache
    def whole_run(topology: Topology) -> RunDir:
        run = write_run_folder(tmp_path_factory.mktemp("whole") / "run", job_of(episodes, topology))
        assert run_on_nodes("janus_cluster.training", run) == [0] * topology[1], all_output(run)
        return run

    return whole_run


def curve(run: RunDir) -> list[dict[str, Any]]:
    return [m for m in read_metric_lines(run) if m["kind"] == "train"]


@pytest.mark.parametrize(("begun", "to"), CHANGES)
def test_the_curve_goes_on_as_if_nothing_had_changed(
    episodes: Path, tmp_path: Path, whole_runs: Callable[[Topology], RunDir], begun: Topology, to: Topology
) -> None:
    whole = whole_runs(begun)
    run = write_run_folder(tmp_path / "run", job_of(episodes, to))
    shutil.copytree(whole.checkpoints / "checkpoint-3", run.checkpoints / "checkpoint-3")
    assert run_on_nodes("janus_cluster.training", run) == [0] * to[1], all_output(run)
    assert [m["step"] for m in curve(run)] == [4, 5, 6]
    for found, expected in zip(curve(run), curve(whole)[3:], strict=True):
        for value in ("loss", "loss_text", "loss_action", "learning_rate", "epoch"):
            assert found[value] == pytest.approx(expected[value], rel=0, abs=1e-5), (found["step"], value)
    assert f"was written by {Cut(world_size=begun[1] * begun[2], stage=int(begun[0][-1]))}" in all_output(run)
    assert (run.checkpoints / "checkpoint-6" / "manifest.json").is_file()
