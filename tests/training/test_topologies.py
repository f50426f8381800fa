"""The loss curve does not depend on how many processes train, where they run, or how ZeRO shares the work out.

Every ZeRO stage runs as 1 process, as 2 processes on one node and as 2 nodes of one process (two torchrun agents that
find each other over TCP; both simulated on this machine), 20 optimizer steps in fp32 on the same effective batch of 4.
The reference is one process without ZeRO: every step's loss and its parts are compared with it. Adam hides a gradient
of the wrong scale, so norms are compared too, with ZeRO-1's (DeepSpeed reports none for ZeRO-0 in fp32).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from run_files import read_metric_lines
from training_run import CPU, all_output, run_on_nodes, write_run_folder

from janus_cluster.janusvln.world.demo import write_demo_episodes

pytestmark = pytest.mark.train

STEPS = 20
EFFECTIVE_BATCH = 4
TOPOLOGIES = {"1 process": (1, 1), "2 processes": (1, 2), "2 nodes": (2, 1)}
Curve = list[dict[str, Any]]


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Curve]:
    """Runs a stage on a topology, once however often it is asked for."""
    episodes = tmp_path_factory.mktemp("data") / "demo"
    write_demo_episodes(episodes, num_episodes=4, seed=0, image_size=(160, 120))

    @cache
    def curve(profile: str, topology: str) -> Curve:
        folder = tmp_path_factory.mktemp("runs") / "run"
        return loss_curve(episodes, folder, profile=profile, topology=topology)

    return curve


def loss_curve(episodes: Path, folder: Path, *, profile: str, topology: str) -> Curve:
    """The training lines of metrics.jsonl of one run."""
    nodes, processes = TOPOLOGIES[topology]
    rows = 2
    job = {
        "nodes": nodes,
        "hardware": CPU["hardware"] | {"processes_per_node": processes},
        "model": {"preset": "tiny"},
        "data": {
            "roots": [str(episodes)], "history": 1, "image_width": 84, "min_pixels": 784, "num_workers": 0,
            "validation_fraction": 0,
        },
        "training": {
            "per_device_batch_size": rows, "gradient_accumulation_steps": EFFECTIVE_BATCH // (rows * nodes * processes),
            "effective_batch_size": EFFECTIVE_BATCH, "max_steps": STEPS, "learning_rate": 1e-3, "precision": "fp32",
            "gradient_checkpointing": False, "action_loss_ramp_steps": 10,
        },
        "deepspeed": {"profile": profile},
        "checkpoint": {"every_steps": 1000, "export": False},
    }  # fmt: skip
    run = write_run_folder(folder, job)
    assert run_on_nodes("janus_cluster.training", run) == [0] * nodes, all_output(run)
    return [m for m in read_metric_lines(run) if m["kind"] == "train"]


def test_the_reference_learns_for_twenty_steps(curves: Callable[[str, str], Curve]) -> None:
    reference = curves("zero0", "1 process")
    losses = [m["loss_text"] for m in reference]
    assert [m["step"] for m in reference] == list(range(1, STEPS + 1))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize("profile", ["zero0", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_loss_curve_is_that_of_one_process(
    curves: Callable[[str, str], Curve], profile: str, topology: str
) -> None:
    curve, reference, norms = curves(profile, topology), curves("zero0", "1 process"), curves("zero1", "1 process")
    assert [m["step"] for m in curve] == [m["step"] for m in reference]
    for found, expected in zip(curve, reference, strict=True):
        for value in ("loss", "loss_text", "loss_action", "learning_rate"):
            assert found[value] == pytest.approx(expected[value], rel=0, abs=1e-5), (found["step"], value)
        assert (found["num_tokens"], found["epoch"]) == (expected["num_tokens"], expected["epoch"])
    if profile != "zero0":
        assert [m["grad_norm"] for m in curve] == pytest.approx([m["grad_norm"] for m in norms], rel=1e-4)
