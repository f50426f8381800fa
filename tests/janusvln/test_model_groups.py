"""Which parts learn, and at what rate."""

from __future__ import annotations

import pytest
import torch
from model_cases import IDS, load_case

from janus_cluster.janusvln.model.build import build_model, parameter_groups, render_parameter_groups
from janus_cluster.janusvln.model.janus import JanusModel
from janus_cluster.job.schema import Model, Training, Tune

pytestmark = pytest.mark.train

PREFIXES = {
    "projector": "model.visual.merger.",
    "vision": "model.visual.",
    "vggt_merger": "merger.",
    "action_head": "action_head.",
}


def build(training: Training) -> JanusModel:
    return build_model(Model(preset="tiny"), training, tokenizer_ids=IDS, device="cpu", dtype=torch.float32, seed=0)


def part_of(name: str) -> str:
    return next((part for part, prefix in PREFIXES.items() if name.startswith(prefix)), "llm")


@pytest.mark.parametrize("part", Tune.model_fields)
def test_only_the_tuned_part_gets_gradients_and_groups(part: str) -> None:
    training = Training(tune=Tune(**{name: name == part for name in Tune.model_fields}))
    model = build(training)
    model(**load_case("b1_3img")[0]).loss.backward()
    learnt = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learnt == {name for name, _ in model.named_parameters() if part_of(name) == part}
    groups = parameter_groups(model, training)
    assert {group["name"].removesuffix("_no_decay") for group in groups} == {part}
    assert sum(len(group["params"]) for group in groups) == len(learnt)


def test_groups_have_their_own_rates_and_hold_every_trainable_parameter_once() -> None:
    training = Training(
        learning_rate=3e-5, projector_learning_rate=2e-5, vision_learning_rate=1e-5, weight_decay=0.1,
        tune=Tune(vision=True),
    )  # fmt: skip
    model = build(training)
    groups = parameter_groups(model, training)
    rates = {group["name"]: group["lr"] for group in groups}
    expected = {"llm": 3e-5, "projector": 2e-5, "vision": 1e-5, "vggt_merger": 2e-5, "action_head": 3e-5}
    assert rates == {name + suffix: rate for name, rate in expected.items() for suffix in ("", "_no_decay")}
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids)) == len(list(model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    undecayed = {names[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert "model.language_model.norm.weight" in undecayed
    assert "action_head.0.bias" in undecayed
    assert "lm_head.weight" not in undecayed


def test_groups_are_printed_with_their_counts() -> None:
    training = Training()
    model = build(training)
    text = render_parameter_groups(parameter_groups(model, training))
    assert "lr 2e-05" in text
    llm = next(line for line in text.splitlines() if line.startswith("llm "))
    trunk = [p for n, p in model.named_parameters() if part_of(n) == "llm" and p.ndim > 1]
    assert f"{sum(p.numel() for p in trunk):,} parameters" in llm
