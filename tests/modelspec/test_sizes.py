"""Sizes of the networks, and of a sample, without torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from janus_cluster.errors import UsageError
from janus_cluster.janusvln.data.usable import tokens_of_frame
from janus_cluster.job.schema import Data, Lora, Model, Tune
from janus_cluster.modelspec.networks import PRESETS
from janus_cluster.modelspec.sizes import Sizes, load_sizes, preset_sizes
from janus_cluster.plan.sample import plan_sample


@pytest.fixture(scope="module")
def sizes() -> Sizes:
    return preset_sizes("qwen2.5-vl-7b")


@pytest.mark.parametrize(("name", "qwen"), [("qwen2.5-vl-3b", 3_754_622_976), ("qwen2.5-vl-7b", 8_292_166_656)])
def test_the_presets_have_the_published_number_of_parameters(name: str, qwen: int) -> None:
    parameters = preset_sizes(name).parameters
    assert parameters["llm"] + parameters["vision"] + parameters["projector"] == qwen


def test_vggt_is_counted_without_the_blocks_that_are_not_used(sizes: Sizes) -> None:
    # 909,112,320 published, less one frame and one global block of 12 C² + 13 C, and 2 × 2 norms of a head's width
    block = 12 * 1024**2 + 13 * 1024 + 2 * 1024 + 4 * 64
    assert sizes.vggt_parameters == 909_112_320 - 2 * block


def test_frozen_parts_and_adapters_are_distinguished(sizes: Sizes) -> None:
    everything = sum(sizes.parameters.values())
    trained = sizes.trained_parameters(Tune(), Lora())
    assert trained == everything - sizes.parameters["vision"]
    lora = Lora(enabled=True, rank=8, target_modules=["q_proj", "down_proj"])
    assert sizes.adapter_parameters(lora) == 28 * 8 * ((3584 + 3584) + (18944 + 3584))
    assert sizes.trained_parameters(Tune(), lora) == trained - sizes.parameters["llm"] + sizes.adapter_parameters(lora)


def test_a_config_json_wins_over_the_preset_and_a_foreign_one_is_refused(tmp_path: Path) -> None:
    preset = PRESETS["qwen2.5-vl-3b"]
    values = {"model_type": "qwen2_5_vl", **preset.text, "vision_config": preset.vision, "tie_word_embeddings": True}
    values["vocab_size"] = 1000
    (tmp_path / "config.json").write_text(json.dumps(values))
    loaded = load_sizes(Model(preset="qwen2.5-vl-3b", path=str(tmp_path)))
    published = preset_sizes("qwen2.5-vl-3b")
    assert loaded.language.vocabulary == 1000
    assert published.parameters["llm"] - loaded.parameters["llm"] == (151936 - 1000) * 2048
    assert loaded.vision == published.vision
    with pytest.raises(UsageError, match=r"preset qwen2\.5-vl-7b has"):
        load_sizes(Model(preset="qwen2.5-vl-7b", path=str(tmp_path)))


def test_a_tied_flag_beside_another_head_counts_that_head(tmp_path: Path) -> None:
    preset = PRESETS["tiny"]
    values = {"model_type": "qwen2_5_vl", **preset.text, "vision_config": preset.vision, "vocab_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": True}))
    tied = load_sizes(Model(preset="tiny", path=str(tmp_path)))
    header = {
        name: {"dtype": "U8", "shape": [8, 64], "data_offsets": [begin, begin + 512]}
        for name, begin in (("model.embed_tokens.weight", 0), ("lm_head.weight", 512))
    }
    text = json.dumps(header).encode()
    data = bytes(1023) + b"\1"
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    untied = load_sizes(Model(preset="tiny", path=str(tmp_path)))
    assert untied.parameters["llm"] - tied.parameters["llm"] == 8 * 64


def test_a_folder_that_is_not_here_means_the_preset() -> None:
    assert load_sizes(Model(path="$MODEL_PATH")) == preset_sizes("qwen2.5-vl-7b")


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("camera", [(640, 480), (480, 640), (1920, 1080), (100, 90), (333, 222)])
@pytest.mark.parametrize("limits", [{}, {"max_pixels": 100_000}, {"min_pixels": 400_000}, {"image_width": 168}])
def test_frames_have_as_many_tokens_as_in_training(mode: str, camera: tuple[int, int], limits: dict[str, int]) -> None:
    data = Data.model_validate({"image_mode": mode} | limits)
    sample = plan_sample(data.model_copy(update={"max_length": 10**6}), camera=camera)
    assert sample.memory_tokens + 2 == tokens_of_frame(*camera, data)


def test_a_sample_has_the_tokens_of_the_documents() -> None:
    assert plan_sample(Data()).tokens == 3909
    assert plan_sample(Data(image_mode="pad")).tokens == 9 * 529 + 390
    assert plan_sample(Data(history=0)).tokens == 391 + 2 + 372


def test_a_sample_that_training_would_refuse_is_refused() -> None:
    with pytest.raises(UsageError, match=r"data.max_length: 8192: a sample of 33 frames") as raised:
        plan_sample(Data(history=32))
    assert "--set data.max_length=" in (raised.value.hint or "")
