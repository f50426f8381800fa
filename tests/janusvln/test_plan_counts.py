"""The plan against what torch counts and allocates in passes through networks on the meta device, and real engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plan_on_meta import (
    build_network,
    count_parts,
    follow_memory,
    make_batch,
    planned_parts,
    real_size,
    setup_of,
    training_of,
)
from torch.utils.flop_counter import sdpa_flop_count

from benchmarks.ways import SIZES, network_sizes
from janus_cluster.job.schema import Data, Lora, Tune
from janus_cluster.plan.flops import Work, count_flops
from janus_cluster.plan.memory import activation_bytes, plan_memory, touched_elements
from janus_cluster.plan.sample import Sample, plan_sample

pytestmark = pytest.mark.train

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("plan_gradient_worker.py")
TINY_SAMPLE = Sample(
    frames=5, width=56, height=70, rows=4, columns=4, vggt_patches=20, text_tokens=8, label_tokens=6
)  # fmt: skip


@pytest.mark.parametrize("every", [0, 1, 2])
def test_every_part_counts_what_torch_counts_to_the_last_operation(every: int) -> None:
    size = SIZES["tiny"]
    model = build_network(size, training_of(every))
    batch = make_batch(model, TINY_SAMPLE, 1)
    counted = count_parts(model, batch)
    assert counted == planned_parts(count_flops(network_sizes(size), TINY_SAMPLE, Work(recompute_every=every)))
    assert sum(counted.values()) == 2 * counted["whole"]


def _torch_counts_grouped_heads() -> bool:
    try:
        sdpa_flop_count((1, 4, 8, 8), (1, 2, 8, 8), (1, 2, 8, 8))  # type: ignore[no-untyped-call]
    except AssertionError:
        return False
    return True


@pytest.mark.skipif(
    not _torch_counts_grouped_heads(),
    reason="compares with torch's own counter, which in this torch takes no grouped heads (torch 2.8 does not)",
)
def test_torch_itself_counts_the_whole_square_and_the_scores_twice_in_the_backward_pass() -> None:
    size = SIZES["tiny"]
    model = build_network(size, training_of(0))
    batch = make_batch(model, TINY_SAMPLE, 1)
    ours, torchs = (count_parts(model, batch, as_torch=as_torch) for as_torch in (False, True))
    square = 4 * TINY_SAMPLE.tokens**2 * 64 * size.text_layers
    assert torchs["llm_forward"] - ours["llm_forward"] == square / 2
    assert torchs["llm_backward"] - ours["llm_backward"] == square * (5 / 2 - 1)
    assert torchs["vision"] == ours["vision"]


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("every", [0, 1, 2])
def test_memory_at_the_real_widths_is_never_planned_too_small(every: int, rows: int) -> None:
    size = replace(real_size("qwen2.5-vl-7b"), text_layers=2, vision_blocks=8, vggt_depth=3, dino_depth=2)
    sample = plan_sample(Data())
    model = build_network(size, training_of(every))
    found = follow_memory(model, make_batch(model, sample, rows))
    planned = plan_memory(network_sizes(size), sample, setup_of(every, rows))
    print(found, planned.in_gb())
    assert 1 <= planned.encoder / max(found["vision"], found["vggt"]) < 1.1
    peak = max(planned.encoder, planned.activations + planned.logits)
    kept = activation_bytes(network_sizes(size), sample, setup_of(every, rows))
    assert found["kept"] < kept + planned.logits
    assert kept < found["kept"]
    # Above what is kept, the plan adds up moments that follow each other; below it may never be.
    assert found["peak"] <= peak < found["peak"] + planned.activations + planned.logits - kept


@pytest.mark.parametrize("learns", ["ViT too", "LoRA"])
@pytest.mark.parametrize("every", [0, 1])
def test_nor_where_something_else_learns(every: int, learns: str) -> None:
    size = replace(real_size("qwen2.5-vl-7b"), text_layers=2, vision_blocks=8, vggt_depth=3, dino_depth=2)
    sample = plan_sample(Data())
    model = build_network(size, training_of(every, learns))
    found = follow_memory(model, make_batch(model, sample, 1))
    planned = plan_memory(network_sizes(size), sample, setup_of(every, 1, learns))
    assert found["peak"] <= max(planned.encoder, planned.activations + planned.logits)


def test_a_rank_keeps_whole_gradients_of_the_tensors_that_its_part_cuts(tmp_path: Path) -> None:
    out = tmp_path / "held.json"
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command = [sys.executable, *torchrun, "--rdzv-endpoint=127.0.0.1:0", str(WORKER), str(out)]
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text(encoding="utf-8"))
    groups = found["2"]["groups"]
    everything, held = sum(sum(group) for group in groups), touched_elements(groups, 2)
    assert held > 1.05 * everything / 2
    # ZeRO-2: the sum so far, and one copy more while a backward pass runs.
    assert (found["2"]["sums"], found["2"]["copy"]) == (held, held)
    # ZeRO-1 makes that copy within the pass only where communication overlaps, on GPUs.
    assert found["1"]["sums"] == everything
    assert found["2"]["bytes"] == torch.float32.itemsize * held
    # The vocabulary is made from the data; all other tensors are the plan's, in its order.
    planned = network_sizes(SIZES["tiny"]).trained_groups(Tune(), Lora())
    assert _without_largest(planned) == _without_largest(groups)


def _without_largest(groups: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(count for count in group if count != max(group)) for group in groups}
