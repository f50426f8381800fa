"""The named networks have the sizes that were published."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from model_cases import CHECKPOINT, IDS, load_case

from janus_cluster.janusvln.model.build import build_model
from janus_cluster.janusvln.model.janus import JanusConfig, JanusModel
from janus_cluster.janusvln.model.load import model_shapes
from janus_cluster.janusvln.model.presets import build_config
from janus_cluster.janusvln.model.vggt import Aggregator
from janus_cluster.janusvln.model.vggt_weights import vggt_state_dict
from janus_cluster.job.schema import Model, Training
from janus_cluster.modelspec.check_weights import load_config_values
from janus_cluster.modelspec.networks import PRESETS, VggtConfig
from janus_cluster.modelspec.weight_names import OWN_PREFIXES, janus_shapes, name_in_model, name_on_disk, vggt_shapes

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


@pytest.mark.parametrize("preset", ["tiny", "qwen2.5-vl-3b", "qwen2.5-vl-7b"])
def test_the_table_without_torch_is_the_network(preset: str, tmp_path: Path) -> None:
    config = build_config(Model(preset=preset), IDS)
    shapes = model_shapes(config)
    assert janus_shapes(config.to_dict()) == shapes
    config.save_pretrained(tmp_path)
    assert janus_shapes(load_config_values(tmp_path)) == shapes
    assert {name_in_model(name_on_disk(name)) for name in shapes} == set(shapes)


def test_the_table_reads_the_flat_layout_of_the_hub() -> None:
    values = load_config_values(CHECKPOINT)
    assert "text_config" not in values
    assert janus_shapes(values) == model_shapes(JanusConfig.from_pretrained(CHECKPOINT))


@pytest.mark.parametrize("config", [VggtConfig(), PRESETS["tiny"].vggt])
def test_vggts_table_without_torch_is_the_network(config: VggtConfig) -> None:
    with torch.device("meta"):
        state = vggt_state_dict(Aggregator(config))
    assert vggt_shapes(config) == {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_default_dimensions_are_those_of_vggt_1b() -> None:
    # One layer more than VGGT-1B's 24, since the last blocks of a network are left out here.
    shapes = vggt_shapes(VggtConfig(depth=25))
    assert len(shapes) == 1210
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 909_112_320
    # sha256 of the sorted lines "name<TAB>shape" of the published Aggregator().state_dict()
    lines = "\n".join(sorted(f"{name}\t{shape}" for name, shape in shapes.items()))
    digest = "c13b3938c76fa14cf8919c9248320f77697aca984d3ad51d95088c9a49feb8be"
    assert hashlib.sha256(lines.encode()).hexdigest() == digest


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
    assert float(out.loss.detach()) == pytest.approx(float(build_tiny(1)(**batch).loss.detach()), rel=2e-2)
