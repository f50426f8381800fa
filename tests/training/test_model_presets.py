"""The named networks have the sizes that were published."""

from __future__ import annotations

import pytest
import torch
from model_cases import IDS, load_case

from janus_cluster.config.schema import Model, Training
from janus_cluster.training.model.build import build_model
from janus_cluster.training.model.janus import OWN_PREFIXES, JanusModel
from janus_cluster.training.model.presets import build_config

pytestmark = pytest.mark.train


def build_tiny(seed: int) -> JanusModel:
    return build_model(
        Model(preset="tiny"), Training(), tokenizer_ids=IDS, device="cpu", dtype=torch.float32, seed=seed
    )


@pytest.mark.parametrize(
    ("preset", "qwen_parameters"), [("qwen2.5-vl-3b", 3_754_622_976), ("qwen2.5-vl-7b", 8_292_166_656)]
)
def test_qwen_presets_have_the_published_number_of_parameters(preset: str, qwen_parameters: int) -> None:
    with torch.device("meta"):
        model = JanusModel(build_config(Model(preset=preset)))
    counts = [p.numel() for name, p in model.named_parameters() if not name.startswith(OWN_PREFIXES)]
    assert sum(counts) == qwen_parameters
    hidden = model.config.text_config.hidden_size
    assert tuple(model.merger.mlp[0].weight.shape) == (4096, 8192)
    assert tuple(model.merger.mlp[2].weight.shape) == (hidden, 4096)
    assert tuple(model.action_head[0].weight.shape) == (512, hidden)
    assert tuple(model.action_head[3].weight.shape) == (4, 512)


def test_tiny_is_the_same_for_the_same_seed_only() -> None:
    one, same, other = build_tiny(1), build_tiny(1), build_tiny(2)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name]), name
    assert torch.equal(one.vggt.camera_token, same.vggt.camera_token)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert not torch.equal(one.vggt.camera_token, other.vggt.camera_token)


def test_tiny_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    build_tiny(1)
    assert torch.equal(torch.rand(1), expected)


def test_job_keys_reach_the_configuration() -> None:
    config = build_config(Model(preset="tiny", lam=0.5, reference_frame="last"), IDS)
    assert (config.lam, config.reference_frame) == (0.5, "last")
    assert (config.image_token_id, config.text_config.vocab_size, config.text_config.pad_token_id) == (595, 600, 590)


def test_bf16_keeps_the_rotary_frequencies_in_fp32() -> None:
    model = build_model(Model(preset="tiny"), Training(), tokenizer_ids=IDS, device="cpu", dtype=torch.bfloat16, seed=1)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.vggt.dtype == torch.bfloat16
    frequencies = model.model.language_model.rotary_emb.inv_freq
    assert torch.equal(frequencies, build_tiny(1).model.language_model.rotary_emb.inv_freq)


def test_bf16_training_pass_has_an_fp32_loss_near_the_exact_one() -> None:
    batch, _ = load_case("b2_3img_padded")
    half = build_model(Model(preset="tiny"), Training(), tokenizer_ids=IDS, device="cpu", dtype=torch.bfloat16, seed=1)
    out = half(**batch)
    out.loss.backward()
    assert {out.loss.dtype, out.action_logits.dtype, out.segment_loss_sum.dtype} == {torch.float32}
    assert float(out.loss.detach()) == pytest.approx(float(build_tiny(1)(**batch).loss.detach()), rel=1e-2)
