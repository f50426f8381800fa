"""The whole network against the published implementation's numbers, and what a batch may look like."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import CASES, IDS, build_reference_model, load_case, worst

from janus_cluster.janusvln.model import pixels
from janus_cluster.janusvln.model.build import set_recompute
from janus_cluster.janusvln.model.janus import JanusModel, JanusOutput
from janus_cluster.job.schema import Training, Tune

pytestmark = pytest.mark.train

SEGMENTS = ("subinstruction", "2d", "3d", "action")


@pytest.fixture(scope="module")
def loaded() -> JanusModel:
    return build_reference_model()


@pytest.fixture
def model(loaded: JanusModel) -> JanusModel:
    loaded.zero_grad()
    loaded.config.reference_frame = "first"
    return loaded


def forward(model: JanusModel, name: str) -> tuple[JanusOutput, dict[str, torch.Tensor]]:
    batch, expected = load_case(name)
    model.config.reference_frame = CASES[name]["reference_frame"]
    return model(**batch, action_loss_weight=CASES[name]["distill_loss_weight"]), expected


@pytest.mark.parametrize("name", CASES)
def test_losses_and_action_logits_are_the_published_ones(name: str, model: JanusModel) -> None:
    out, expected = forward(model, name)
    assert worst(out.loss.detach(), expected["out.loss_total"]) < 1e-5
    assert worst(out.text_loss, expected["out.loss_text"]) < 1e-5
    assert worst(out.action_loss, expected["out.loss_action"]) < 1e-5
    assert worst(out.action_logits, expected["out.action_logits"]) < 1e-5
    segments = torch.stack([expected[f"out.loss_segment.{segment}"] for segment in SEGMENTS])
    assert worst(out.segment_loss_sum / out.segment_weight_sum, segments) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_every_gradient_is_the_published_one(name: str, model: JanusModel) -> None:
    out, expected = forward(model, name)
    out.loss.backward()
    norms = dict(CASES[name]["grad_norm_per_parameter"]["out"])
    for parameter_name, parameter in model.named_parameters():
        stored_name = parameter_name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        assert float(parameter.grad.norm()) == pytest.approx(norms.pop(stored_name), rel=1e-4), parameter_name
    assert not norms
    for key in [key for key in expected if key.startswith("out.grad.")]:
        assert worst(model.get_parameter(key.removeprefix("out.grad.")).grad, expected[key]) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_embeddings_before_and_after_fusion_are_the_published_ones(name: str, model: JanusModel) -> None:
    batch, expected = load_case(name)
    model.config.reference_frame = CASES[name]["reference_frame"]
    patches = torch.cat([pixels.qwen_patches(frames) for frames in batch["frames"]])
    grid = batch["image_grid_thw"]
    with torch.no_grad():
        embeds = model.model.get_image_features(patches, grid, return_dict=True).pooler_output
        memories = [model.remember(pixels.unit_frames(frames)) for frames in batch["frames"]]
        merged = model.merge_memories(memories)
        fused = model.encode_images(patches, grid, [pixels.unit_frames(frames) for frames in batch["frames"]])
        hidden = model.hidden_states(
            fused,
            input_ids=batch["input_ids"],
            image_grid_thw=grid,
            attention_mask=batch["attention_mask"],
            mm_token_type_ids=batch["mm_token_type_ids"],
        )
        logits = model.label_logits(hidden, batch["labels"])
    assert worst(torch.cat(embeds), expected["out.image_embeds"]) < 5e-5
    assert worst(torch.stack(memories).flatten(1, 2), expected["out.vggt_features_merge_order"]) < 5e-5
    assert worst(torch.stack(merged), expected["out.image_embeds_3d"]) < 5e-5
    assert worst(torch.cat(fused), expected["out.image_embeds_fused"]) < 5e-5
    assert worst(logits, expected["out.logits_at_labels"]) < 5e-5


@pytest.mark.parametrize("name", CASES)
def test_positions_are_the_published_ones(name: str, model: JanusModel) -> None:
    batch, expected = load_case(name)
    positions, _ = model.model.get_rope_index(
        batch["input_ids"],
        batch["mm_token_type_ids"],
        image_grid_thw=batch["image_grid_thw"],
        attention_mask=batch["attention_mask"],
    )
    real = batch["attention_mask"].bool().expand(3, -1, -1)
    assert torch.equal(positions[real], expected["in.position_ids"][real])


def pad_together(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """Two batches as one, the shorter padded on the right."""
    length = max(one["input_ids"].shape[1], two["input_ids"].shape[1])
    fill = {"input_ids": IDS.pad_token_id, "labels": -100}
    joined: dict[str, Any] = {}
    for key in ("input_ids", "attention_mask", "mm_token_type_ids", "labels", "loss_weights", "segment_ids"):
        rows = [
            torch.nn.functional.pad(b[key], (0, length - b[key].shape[1]), value=fill.get(key, 0)) for b in (one, two)
        ]
        joined[key] = torch.cat(rows)
    for key in ("actions", "image_grid_thw"):
        joined[key] = torch.cat((one[key], two[key]))
    return joined | {"frames": [*one["frames"], *two["frames"]]}


@pytest.mark.parametrize("names", [("b1_9img", "b1_1img"), ("b1_1img", "b1_9img")])
def test_samples_of_unequal_frames_and_sizes_do_not_touch_each_other(names: tuple[str, str], model: JanusModel) -> None:
    one, two = (load_case(name)[0] for name in names)
    assert one["frames"][0].shape[2:] != two["frames"][0].shape[2:]
    with torch.no_grad():
        alone = [model(**one), model(**two)]
        together = model(**pad_together(one, two))
    assert worst(together.action_logits, torch.cat([out.action_logits for out in alone])) < 2e-5
    assert torch.allclose(together.segment_loss_sum, sum(out.segment_loss_sum for out in alone), rtol=1e-5)


def test_micro_batches_with_the_whole_denominator_give_the_whole_gradient(model: JanusModel) -> None:
    batch, _ = load_case("b2_3img_padded")
    model(**batch).loss.backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    weights = batch["loss_weights"][:, 1:][batch["labels"][:, 1:] != -100].sum()
    for row in range(2):
        images = slice(3 * row, 3 * row + 3)
        part = {k: v[row : row + 1] for k, v in batch.items() if k != "image_grid_thw"}
        out = model(
            **part,
            image_grid_thw=batch["image_grid_thw"][images],
            loss_denominator=torch.stack((weights, torch.tensor(2.0))),
        )
        out.loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, whole[name], rtol=1e-4, atol=1e-4 * float(whole[name].abs().max())), name


@pytest.mark.parametrize(("every", "vision"), [(1, True), (2, False), (3, True)])
def test_recomputing_every_nth_layer_changes_no_gradient(every: int, vision: bool, model: JanusModel) -> None:
    batch, _ = load_case("b1_3img")
    model(**batch).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    set_recompute(model, Training(gradient_checkpointing_every=every, tune=Tune(vision=vision)))
    try:
        layers = model.model.language_model.layers
        assert [layer.gradient_checkpointing for layer in layers] == [i % every == 0 for i in range(len(layers))]
        assert {block.gradient_checkpointing for block in model.model.visual.blocks} == {vision}
        model(**batch).loss.backward()
    finally:
        set_recompute(model, Training(gradient_checkpointing=False))
    assert not model.is_activation_checkpointing
    assert all(torch.equal(p.grad, plain[name]) for name, p in model.named_parameters())


def test_reference_frame_decides_whose_memory_is_added(model: JanusModel) -> None:
    frames = pixels.unit_frames(load_case("b1_3img")[0]["frames"][0])
    first = model.remember(frames)
    model.config.reference_frame = "last"
    assert torch.equal(model.remember(frames.flip(0)), first)
    assert not torch.equal(model.remember(frames), first)


def test_vggt_is_no_part_of_the_module_tree(model: JanusModel) -> None:
    owned = {id(p) for p in model.parameters()}
    assert not any(id(p) in owned for p in model.vggt.parameters())
    assert not any("vggt" in name or "aggregator" in name for name in model.state_dict())
    assert not any(module is model.vggt for module in model.modules())


def test_without_labels_the_action_is_read_at_the_last_token(model: JanusModel) -> None:
    batch, expected = load_case("b1_3img")
    first_label = int((batch["labels"][0] != -100).nonzero()[0])
    prompt = {k: batch[k][:, :first_label] for k in ("input_ids", "attention_mask", "mm_token_type_ids")}
    padded = {k: torch.nn.functional.pad(v, (0, 5)) for k, v in prompt.items()}
    with torch.no_grad():
        for inputs in (prompt, padded):
            out = model(**inputs, frames=batch["frames"], image_grid_thw=batch["image_grid_thw"])
            assert out.loss is None
            assert worst(out.action_logits, expected["out.action_logits"]) < 2e-5


def test_counts_that_disagree_are_refused(model: JanusModel) -> None:
    batch, _ = load_case("b1_3img")
    with pytest.raises(ValueError, match="2 frames, 3 grids"):
        model(**(batch | {"frames": [batch["frames"][0][:2]]}))


def test_a_model_without_vggt_is_reported() -> None:
    bare = JanusModel.from_pretrained(build_reference_model().name_or_path)
    with pytest.raises(ValueError, match="attach_vggt"):
        bare(**load_case("b1_1img")[0])
