"""training.compile: the network trains the same, whether VGGT's blocks are compiled or not."""

from __future__ import annotations

import shutil

import pytest
import torch
from model_cases import IDS
from model_zero_worker import make_batch

from janus_cluster.janusvln.model.build import build_model
from janus_cluster.janusvln.model.compile import COMPILED_BLOCKS
from janus_cluster.janusvln.model.janus import JanusModel
from janus_cluster.job.schema import Model, Training

pytestmark = pytest.mark.train


def build(training: Training) -> JanusModel:
    return build_model(Model(preset="tiny"), training, tokenizer_ids=IDS, device="cpu", dtype=torch.float32, seed=7)


def compiled_blocks(model: JanusModel) -> tuple[int, int]:
    """(VGGT's compiled blocks, those of the rest of the network)."""
    inside = [m for m in model.modules() if isinstance(m, COMPILED_BLOCKS)]
    outside = [m for m in model.vggt.modules() if isinstance(m, COMPILED_BLOCKS)]
    found = [sum(m._compiled_call_impl is not None for m in blocks) for blocks in (outside, inside)]
    return found[0], found[1]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on the CPU needs g++")
def test_loss_and_gradients_are_the_same_with_compiled_vggt_blocks() -> None:
    torch.compiler.reset()
    batch = make_batch([2], seed=0)
    plain, fast = build(Training()), build(Training(compile="vggt"))
    assert compiled_blocks(plain) == (0, 0)
    in_vggt, elsewhere = compiled_blocks(fast)
    assert (in_vggt > 0, elsewhere) == (True, 0)
    losses = []
    for model in (plain, fast):
        loss = model(**batch).loss
        loss.backward()
        losses.append(float(loss.detach()))
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    learnt = [(a.grad, b.grad) for a, b in zip(plain.parameters(), fast.parameters(), strict=True) if a.requires_grad]
    assert learnt
    for a, b in learnt:
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
