"""Adapters on the language model: what learns, what they change, and the weights without them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_cases import CHECKPOINT, IDS, load_case

from janus_cluster.errors import UsageError
from janus_cluster.janusvln.model.build import build_model, parameter_groups
from janus_cluster.janusvln.model.janus import JanusModel
from janus_cluster.janusvln.model.load import load_exported, write_vggt
from janus_cluster.janusvln.model.lora import is_adapter, merge_adapters
from janus_cluster.job.schema import Lora, Model, Training, Tune

pytestmark = pytest.mark.train

LORA = Lora(enabled=True, rank=4, alpha=8, target_modules=["q_proj", "down_proj"])


def build(training: Training, *, dtype: torch.dtype = torch.float32) -> JanusModel:
    model = Model(preset="tiny", path=str(CHECKPOINT))
    return build_model(model, training, tokenizer_ids=IDS, device="cpu", dtype=dtype, seed=3)


def step(model: JanusModel, training: Training) -> None:
    """Two updates: the first moves only B, which starts at zero."""
    batch, _ = load_case("b1_3img")
    optimizer = torch.optim.SGD(parameter_groups(model, training))
    for _ in range(2):
        model.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def test_adapters_learn_in_place_of_the_language_model_and_the_other_parts_as_before() -> None:
    training = Training(lora=LORA)
    model = build(training)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    adapters = {name for name in learning if is_adapter(name)}
    assert len(adapters) == 2 * 2 * 2  # layers, targets, A and B
    assert all("language_model.layers" in name for name in adapters)
    others = {name for name, p in build(Training()).named_parameters() if p.requires_grad}
    kept = ("model.visual.merger.", "merger.", "action_head.")
    assert learning - adapters == {name for name in others if name.startswith(kept)}
    assert {g["name"] for g in parameter_groups(model, training)} >= {"llm", "projector", "vggt_merger", "action_head"}


def test_adapters_change_nothing_before_the_first_step_and_are_drawn_from_the_seed() -> None:
    model, plain = build(Training(lora=LORA)), build(Training())
    batch, _ = load_case("b1_3img")
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, plain(**batch).loss)
    again = build(Training(lora=LORA)).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_a_merged_export_computes_what_the_adapted_model_does(tmp_path: Path) -> None:
    training = Training(lora=LORA, learning_rate=0.5, tune=Tune(vggt_merger=False))
    model = build(training)
    step(model, training)
    merged = merge_adapters(model.state_dict(), LORA)
    plain = build(Training()).state_dict()
    assert merged.keys() == plain.keys()
    moved = {name for name in plain if not torch.equal(plain[name], merged[name]) and "language_model" in name}
    assert {name.split(".")[-2] for name in moved} == {"q_proj", "down_proj"}
    assert len(moved) == 4
    model.save_pretrained(tmp_path, state_dict=merged)
    write_vggt(model, tmp_path)
    loaded = load_exported(tmp_path, device="cpu", dtype=torch.float32)
    batch, _ = load_case("b1_3img")
    model.eval()
    with torch.no_grad():
        exact, exported = model(**batch), loaded(**batch)
    assert float(exported.loss) == pytest.approx(float(exact.loss), abs=1e-5)
    assert not torch.allclose(exact.loss, build(Training()).eval()(**batch).loss, atol=1e-2)


def test_merging_without_adapters_gives_the_same_weights() -> None:
    state = build(Training()).state_dict()
    merged = merge_adapters(state, LORA)
    assert merged.keys() == state.keys()
    assert all(merged[name] is tensor for name, tensor in state.items())


def test_adapters_have_the_models_dtype() -> None:
    model = build(Training(lora=LORA), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    merged = merge_adapters(model.state_dict(), LORA)
    assert merged["model.language_model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("targets", [["qkv"], []])
def test_a_target_that_is_no_layer_of_the_language_model_is_refused(targets: list[str]) -> None:
    with pytest.raises(UsageError, match=r"training\.lora\.target_modules: (qkv|empty); allowed: q_proj"):
        build(Training(lora=LORA.model_copy(update={"target_modules": targets})))
