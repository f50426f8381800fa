"""The traffic that plan/time.py computes, against the collectives of real engines, byte by byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from plan_traffic_worker import ACCUMULATION, STAGES
from test_plan_memory import tiny_sizes

from janus_cluster.plan.flops import Work
from janus_cluster.plan.setup import Setup
from janus_cluster.plan.time import Traffic, plan_traffic

pytestmark = pytest.mark.train

WORKER = Path(__file__).with_name("plan_traffic_worker.py")
# A rank's flat tensors are rounded up, and with the last micro-step the norms of the gradients are agreed on.
SMALL = 128


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, int]]]:
    """Per ZeRO stage: the bytes of each micro-step of an optimizer step, by collective."""
    out = tmp_path_factory.mktemp("traffic") / "sent.json"
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command = [sys.executable, *torchrun, "--rdzv-endpoint=127.0.0.1:0", str(WORKER), str(out)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return {int(stage): steps for stage, steps in found.items()}


def traffic(stage: int) -> Traffic:
    setup = Setup(
        nodes=1, ranks_per_node=2, stage=stage, offload_optimizer=False, offload_parameters=False, micro_batch=1,
        accumulation=ACCUMULATION, element_bytes=2, work=Work(), persistence_threshold=0,
    )  # fmt: skip
    return plan_traffic(tiny_sizes(), setup)


@pytest.mark.parametrize("stage", STAGES)
def test_engines_send_the_predicted_bytes_in_the_micro_step_where_they_are_predicted(
    sent: dict[int, list[dict[str, int]]], stage: int
) -> None:
    planned = traffic(stage)
    gathers, reduces = planned.gather_forward + planned.gather_backward, planned.reduce
    for number, step in enumerate(sent[stage]):
        is_last = number == ACCUMULATION - 1
        reduced = step.get("_reduce_scatter_base_" if stage == 3 else "allreduce_", 0)
        assert reduced == pytest.approx(reduces + is_last * planned.reduce_step, abs=SMALL), number
        gathered = step.get("_allgather_base_", 0)
        assert gathered == pytest.approx(gathers + is_last * planned.gather_step, abs=SMALL), number
        assert set(step) <= {"allreduce_", "_allgather_base_", "_reduce_scatter_base_"}


def test_zero1_sends_gradients_once_a_step_and_zero2_after_every_micro_step(
    sent: dict[int, list[dict[str, int]]],
) -> None:
    assert sent[1][:-1] == [{}] * (ACCUMULATION - 1)
    assert all(step["allreduce_"] > 0 for step in sent[2])
