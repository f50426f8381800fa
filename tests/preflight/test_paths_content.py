"""Paths as a user means them: shards, headers, tokenizer, episodes and room, on real files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from weight_files import write_safetensors

from janus_cluster.job.schema import JobConfig
from janus_cluster.modelspec.networks import PRESETS
from janus_cluster.modelspec.sizes import load_sizes
from janus_cluster.modelspec.weight_names import janus_shapes, name_on_disk, vggt_shapes
from janus_cluster.preflight.data_scan import scan_data
from janus_cluster.preflight.path_view import read_view
from janus_cluster.preflight.paths import judge_output, judge_paths, read_paths
from janus_cluster.preflight.room import checkpoint_room_bytes, count_parameters
from janus_cluster.run.records.verdict import CheckResult

TINY = PRESETS["tiny"]
CONFIG: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "vocab_size": 64,
    **TINY.text,
    "vision_config": TINY.vision,
    "vggt_config": TINY.vggt.to_dict(),
}


def write_model(folder: Path) -> Path:
    """A Qwen2.5-VL folder of tiny numbers in two shards, as the hub lays it out."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (folder / name).write_text("{}")
    own = ("merger.", "action_head.")
    shapes = {name_on_disk(n): s for n, s in janus_shapes(CONFIG).items() if not n.startswith(own)}
    names = sorted(shapes)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, inside in shards.items():
        write_safetensors(folder / shard, {n: shapes[n] for n in inside})
    weight_map = {n: shard for shard, inside in shards.items() for n in inside}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_vggt(path: Path) -> Path:
    write_safetensors(path, vggt_shapes(TINY.vggt))
    return path


def write_data(folder: Path, episodes: int = 2) -> Path:
    for i in range(episodes):
        episode = folder / f"ep_{i}"
        episode.mkdir(parents=True)
        (episode / "milestones_result.json").write_text("{}")
        for step in range(3):
            Image.new("RGB", (32, 24)).save(episode / f"step_{step}_STOP.png")
            (episode / f"step_{step}_STOP.json").write_text("{}")
    return folder


def job(**sections: Any) -> JobConfig:
    return JobConfig(name="x", preflight={"min_free_gb": 0}, **sections)


def judge(tmp_path: Path, **sections: Any) -> dict[str, CheckResult]:
    config = job(**sections)
    return {r.id: r for r in judge_paths(read_paths(config, tmp_path), config, node="h800-02")}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def vggt(tmp_path: Path) -> Path:
    return write_vggt(tmp_path / "vggt.safetensors")


def judged_model(tmp_path: Path, model: Path, vggt: Path) -> dict[str, CheckResult]:
    return judge(tmp_path, model={"preset": "tiny", "path": str(model), "vggt_path": str(vggt)})


def test_a_whole_model_passes_and_shows_its_headers(tmp_path: Path, model: Path, vggt: Path) -> None:
    judged = judged_model(tmp_path, model, vggt)
    assert {i: r.state for i, r in judged.items() if i != "paths.inodes"} == {
        "paths.model": "PASS", "paths.vggt": "PASS", "paths.output": "PASS",
    }  # fmt: skip
    assert "tensors taken" in judged["paths.model"].measured


DAMAGES: dict[str, tuple[Any, str, str]] = {
    "a shard is missing": (
        lambda m: (m / "model-00002-of-00002.safetensors").unlink(),
        "FAIL",
        "model-00002-of-00002.safetensors",
    ),
    "a shard is cut": (lambda m: cut(m / "model-00001-of-00002.safetensors", 100), "FAIL", "truncated"),
    "a shard is empty": (
        lambda m: (m / "model-00001-of-00002.safetensors").write_bytes(b""),
        "FAIL",
        "no whole safetensors header",
    ),
    "no configuration": (lambda m: (m / "config.json").unlink(), "FAIL", "config.json"),
    "another family": (lambda m: (m / "config.json").write_text('{"model_type": "llama"}'), "FAIL", "llama"),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), "FAIL", "tokenizer.json or vocab.json is missing"),
    "no processor": (lambda m: (m / "preprocessor_config.json").unlink(), "WARN", "preprocessor_config.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_model_is_named(tmp_path: Path, model: Path, vggt: Path, damage: str) -> None:
    break_it, state, word = DAMAGES[damage]
    break_it(model)
    result = judged_model(tmp_path, model, vggt)["paths.model"]
    assert (result.state, result.node) == (state, "h800-02")
    assert word in result.measured
    assert result.fix


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:-num_bytes])


def test_a_truncated_vggt_is_blamed_on_vggt_alone(tmp_path: Path, model: Path, vggt: Path) -> None:
    cut(vggt, 50)
    judged = judged_model(tmp_path, model, vggt)
    assert (judged["paths.model"].state, judged["paths.vggt"].state) == ("PASS", "FAIL")
    assert "truncated" in judged["paths.vggt"].measured


def test_a_vggt_without_the_aggregator_is_none(tmp_path: Path, model: Path, vggt: Path) -> None:
    write_safetensors(vggt, {"camera_head.x": (4, 4)})
    assert "aggregator." in judged_model(tmp_path, model, vggt)["paths.vggt"].measured


def test_data_is_counted_and_a_frame_decoded(tmp_path: Path) -> None:
    result = judge(tmp_path, data={"roots": [str(write_data(tmp_path / "d"))]})["paths.data"]
    assert result.state == "PASS"
    assert "2 episodes, 6 frames, 6 annotations" in result.measured
    assert "32×24" in result.measured


def test_a_frame_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    root = write_data(tmp_path / "d")
    (root / "ep_0" / "step_0_STOP.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    result = judge(tmp_path, data={"roots": [str(root)]})["paths.data"]
    assert (result.state, "step_0_STOP.png" in result.measured) == ("FAIL", True)


def test_folders_without_episodes_are_nothing_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "d" / "ep").mkdir(parents=True)
    assert "nothing to train on" in judge(tmp_path, data={"roots": [str(tmp_path / "d")]})["paths.data"].measured


@pytest.mark.parametrize(("name", "word"), [("absent", "No such file"), ("empty", "an empty folder")])
def test_a_required_path_must_be_there_and_hold_something(tmp_path: Path, name: str, word: str) -> None:
    (tmp_path / "empty").mkdir()
    config = JobConfig(name="x", preflight={"min_free_gb": 0, "require_paths": [str(tmp_path / name)]})
    judged = judge_paths(read_paths(config, tmp_path), config, node="n1")
    result = next(r for r in judged if r.id == "paths.required")
    assert (result.state, word in result.measured) == ("FAIL", True)


def output(**changes: Any) -> dict[str, Any]:
    return {"path": "/r", "error": None, "free_bytes": 5e9, "free_inodes": 10_000} | changes


@pytest.mark.parametrize(("free_gb", "state"), [(5.0, "PASS"), (5.1, "PASS"), (4.9, "FAIL")])
def test_free_space_is_judged_at_its_threshold(free_gb: float, state: str) -> None:
    for minimum, room in ((5.0, 0), (0.0, 5_000_000_000)):
        judged = judge_output(output(free_bytes=free_gb * 1e9), node="n1", min_free_gb=minimum, room_bytes=room)
        assert judged[0].state == state


@pytest.mark.parametrize(("inodes", "state"), [(10_000, "PASS"), (9_999, "FAIL"), (None, "SKIP")])
def test_free_inodes_are_judged_where_they_are_counted(inodes: int | None, state: str) -> None:
    assert judge_output(output(free_inodes=inodes), node="n1", min_free_gb=0, room_bytes=0)[1].state == state


def test_room_follows_from_the_models_size_and_what_learns() -> None:
    roots = {"roots": ["/d"]}
    seven = job(model={"preset": "qwen2.5-vl-7b"}, data=roots)
    total, learning = count_parameters(seven)
    assert total == pytest.approx(9.4e9, rel=0.05), "Qwen2.5-VL-7B 8.29e9, VGGT's aggregator 0.9e9, mergers"
    assert 7.4e9 < learning < 8e9, "the language model without ViT and VGGT"
    assert checkpoint_room_bytes(seven) == 3 * learning * 14 + total * 2
    kept = job(
        model={"preset": "qwen2.5-vl-7b"}, data=roots, checkpoint={"keep_every": 400}, training={"max_steps": 1000}
    )
    assert checkpoint_room_bytes(kept) == (3 + 2) * learning * 14 + total * 2
    frozen = job(model={"preset": "qwen2.5-vl-7b"}, data=roots, training={"tune": {"llm": False}})
    lora = job(model={"preset": "qwen2.5-vl-7b"}, data=roots, training={"lora": {"enabled": True}})
    assert count_parameters(frozen)[1] < count_parameters(lora)[1] < learning / 10
    assert checkpoint_room_bytes(job(model={"preset": "qwen2.5-vl-7b"})) == 0, "nothing is trained without data"


def test_an_untied_checkpoint_of_a_tied_preset_takes_more_room(tmp_path: Path) -> None:
    preset = PRESETS["qwen2.5-vl-3b"]
    values = {"model_type": "qwen2_5_vl", **preset.text, "vision_config": preset.vision, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(values))
    roots = {"roots": ["/d"]}
    untied = job(model={"preset": "qwen2.5-vl-3b", "path": str(tmp_path)}, data=roots)
    tied = job(model={"preset": "qwen2.5-vl-3b"}, data=roots)
    head = preset.text["vocab_size"] * preset.text["hidden_size"]
    assert [a - b for a, b in zip(count_parameters(untied), count_parameters(tied), strict=True)] == [head, head]
    sizes = load_sizes(untied.model)
    assert count_parameters(untied) == (
        sum(sizes.parameters.values()) + sizes.vggt_parameters,
        sizes.trained_parameters(untied.training.tune, untied.training.lora),
    ), "what `plan` counts"
    assert read_paths(untied, tmp_path)["room_bytes"] == checkpoint_room_bytes(untied) > checkpoint_room_bytes(tied)


@pytest.mark.parametrize("text", ["", "[]", '{"model_type": "qwen2_5_vl"}', '{"model_type": "llama"}'])
def test_a_configuration_that_cannot_be_used_leaves_the_presets_numbers(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    broken = job(model={"preset": "tiny", "path": str(tmp_path)}, data={"roots": ["/d"]})
    assert count_parameters(broken) == count_parameters(job(model={"preset": "tiny"}, data={"roots": ["/d"]}))


def test_two_views_of_one_folder_agree_and_a_changed_byte_differs(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "w.bin").write_bytes(bytes(300_000))
    a, b = (read_view(tmp_path / name, budget_s=5) for name in ("a", "b"))
    assert (a["hash"], a["bytes"], a["files"]) == (b["hash"], b["bytes"], 1)
    changed = bytearray(300_000)
    changed[-1] = 1
    (tmp_path / "b" / "w.bin").write_bytes(bytes(changed))
    assert read_view(tmp_path / "b", budget_s=5)["hash"] != a["hash"]


def test_a_tokenizer_that_is_a_git_lfs_pointer_or_lacks_its_merges_is_named(
    tmp_path: Path, model: Path, vggt: Path
) -> None:
    (model / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7031645\n")
    result = judged_model(tmp_path, model, vggt)["paths.model"]
    assert (result.state, "tokenizer.json: is a Git LFS pointer" in result.measured) == ("FAIL", True)
    (model / "tokenizer.json").unlink()
    (model / "vocab.json").write_text("{}")
    assert "tokenizer.json or merges.txt is missing" in judged_model(tmp_path, model, vggt)["paths.model"].measured


def test_gzipped_annotations_are_something_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "d" / "1").mkdir(parents=True)
    Image.new("RGB", (32, 24)).save(tmp_path / "d" / "1" / "step_0_STOP.png")
    (tmp_path / "d" / "train.json.gz").write_bytes(b"\x1f\x8b")
    result = judge(tmp_path, data={"roots": [str(tmp_path / "d")]})["paths.data"]
    assert (result.state, "1 frames, 1 annotations" in result.measured) == ("PASS", True)


def test_one_folder_is_not_listed_for_longer_than_there_is_time(tmp_path: Path) -> None:
    frames = tmp_path / "d" / "frames"
    frames.mkdir(parents=True)
    for i in range(3_000):
        (frames / f"{i}.png").touch()
    found = scan_data(tmp_path / "d", budget_s=0.001)
    assert found["partial"]
    assert found["frames"] < 3_000


def test_a_view_that_time_was_too_short_for_has_no_hash_that_could_differ(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"weights")
    assert read_view(tmp_path, budget_s=-1) == read_view(tmp_path, budget_s=5) | {"hash": None}


def test_the_folder_that_a_root_names_for_its_images_must_be_there_too(tmp_path: Path) -> None:
    roots = [{"path": str(write_data(tmp_path / "d")), "images": str(tmp_path / "frames")}]
    assert judge(tmp_path, data={"roots": roots})["paths.images"].state == "FAIL"
    write_data(tmp_path / "frames")
    assert judge(tmp_path, data={"roots": roots})["paths.images"].state == "PASS"
