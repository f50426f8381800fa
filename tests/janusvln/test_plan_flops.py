"""The formulas of plan/flops.py against what torch counts in a real pass of the tiny network."""

from __future__ import annotations

import pytest
import torch
from model_cases import IDS
from model_zero_worker import make_batch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from janus_cluster.janusvln.model.build import build_model
from janus_cluster.janusvln.model.presets import build_config
from janus_cluster.job.schema import Lora, Model, Training, Tune
from janus_cluster.modelspec.networks import PRESETS
from janus_cluster.modelspec.sizes import sizes_of
from janus_cluster.plan.flops import Work, count_flops
from janus_cluster.plan.sample import Sample

pytestmark = pytest.mark.train

FRAMES = 5
SAMPLE = Sample(
    frames=FRAMES, width=56, height=70, rows=4, columns=4, vggt_patches=20, text_tokens=2 + 6, label_tokens=6
)


def counted(training: Training) -> float:
    """FLOP of forward and backward, attention through plain products so that torch counts the whole square."""
    torch.set_num_threads(1)
    model = build_model(Model(preset="tiny"), training, tokenizer_ids=IDS, device="cpu", dtype=torch.float32, seed=0)
    batch = make_batch([FRAMES], seed=0)
    assert batch["input_ids"].shape == (1, SAMPLE.tokens)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        model(**batch).loss.backward()
    return float(counter.get_total_flops())


@pytest.mark.parametrize(
    "training",
    [
        Training(gradient_checkpointing=False),
        Training(gradient_checkpointing=True),
        Training(gradient_checkpointing=True, gradient_checkpointing_every=2),
        Training(gradient_checkpointing=False, tune=Tune(vision=True)),
        Training(gradient_checkpointing=True, tune=Tune(vision=True)),
        Training(gradient_checkpointing=False, tune=Tune(llm=False)),
        Training(gradient_checkpointing=False, tune=Tune(llm=False, projector=False, vggt_merger=False)),
        Training(gradient_checkpointing=False, lora=Lora(enabled=True, rank=4)),
    ],
    ids=["plain", "recompute", "every second", "vision", "vision, recompute", "no llm", "action head", "lora"],
)
def test_the_formulas_count_what_torch_counts(training: Training) -> None:
    sizes = sizes_of(build_config(Model(preset="tiny"), IDS).to_dict(), preset=PRESETS["tiny"], name="tiny")
    work = Work(
        tune=training.tune,
        lora=training.lora,
        recompute_every=training.gradient_checkpointing_every if training.gradient_checkpointing else 0,
        causal=False,
    )
    predicted = count_flops(sizes, SAMPLE, work).total
    real = counted(training)
    print(f"{predicted:.4g} predicted, {real:.4g} counted: {predicted / real - 1:+.2%}")
    assert predicted == pytest.approx(real, rel=0.005)
