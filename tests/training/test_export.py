"""Exports of every ZeRO stage, with and without adapters, model.path and a head of its own: read back as trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export_worker import CASES, HEADS, logits_of, name_of
from model_cases import build_reference_model
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from janus_cluster.errors import TrainingFailed
from janus_cluster.janusvln.data.dataset import NavigationDataset
from janus_cluster.janusvln.data.tokenizer import load_tokenizer
from janus_cluster.janusvln.model.janus import JanusModel
from janus_cluster.janusvln.model.load import load_exported
from janus_cluster.janusvln.model.write import name_for_disk, require_readable
from janus_cluster.janusvln.predictions import predict_actions
from janus_cluster.janusvln.world.demo import write_demo_episodes
from janus_cluster.job.schema import Model, SegmentWeights
from janus_cluster.modelspec.check_weights import check_weights
from janus_cluster.modelspec.safetensors_header import read_header
from janus_cluster.training.export import write_model
from janus_cluster.training.subject import load_subject

pytestmark = pytest.mark.train

WORKER = Path(__file__).with_name("export_worker.py")
ALL = [name_of(*case) for case in CASES]
OWN = ("merger.", "action_head.")


@pytest.fixture(scope="module")
def episodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "demo"
    write_demo_episodes(root, num_episodes=1, seed=0, image_size=(160, 120))
    return root


@pytest.fixture(scope="module")
def trained(episodes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each of ALL: its export, and what the network that trained computes itself."""
    out = tmp_path_factory.mktemp("exports")
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment = os.environ | alone | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(WORKER), str(episodes), str(out)]
    with (out / "log").open("w", encoding="utf-8") as log:
        done = subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=600, check=False)
    assert done.returncode == 0, (out / "log").read_text(encoding="utf-8")[-3000:]
    return out


def names_in(export: Path) -> dict[str, tuple[int, ...]]:
    return read_header(export / "model.safetensors")


@pytest.mark.parametrize("head", HEADS)
def test_names_do_not_depend_on_stage_adapter_or_source(trained: Path, head: str) -> None:
    found = [names_in(trained / name / "export") for name in ALL if name.endswith(f"-{head}")]
    assert len(found) == 16
    assert all(names == found[0] for names in found)
    hub = {"model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "visual.merger.ln_q.weight"}
    assert hub < found[0].keys() and ("lm_head.weight" in found[0]) == (head == "untied")


@pytest.mark.parametrize("name", ALL)
def test_an_export_reads_back_as_the_network_that_trained(trained: Path, episodes: Path, name: str) -> None:
    export = trained / name / "export"
    model = load_exported(export, device="cpu", dtype=torch.float32)
    read, live = (
        logits_of(model, model, torch.load(trained / "batch.pt")),
        load_file(export.with_name("live.safetensors")),
    )
    assert torch.allclose(read["text"], live["text"], atol=1e-5), float((read["text"] - live["text"]).abs().max())
    assert torch.allclose(read["action"], live["action"], atol=1e-5)
    is_tied = name.endswith("-tied")
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == is_tied
    assert json.loads((export / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"] == is_tied

    plain, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(export, output_loading_info=True)
    assert not info["missing_keys"] and all(key.startswith(OWN) for key in info["unexpected_keys"])
    assert torch.equal(plain.lm_head.weight, model.lm_head.weight)

    assert (
        "tensors taken, 0 newly initialised (none), 0 ignored"
        in check_weights(Model(preset="tiny", path=str(export)))[0]
    )
    # What `eval` does with the folder, in this process.
    subject = load_subject(export, roots=[str(episodes)])
    tokenizer = load_tokenizer(subject.model)
    samples = subject.load_samples().samples[:1]
    dataset = NavigationDataset(samples, tokenizer=tokenizer, data=subject.data, segment_weights=SegmentWeights())
    scores, _ = predict_actions(model, dataset, pad_token_id=tokenizer.pad_token_id, num_workers=0, report=print)
    assert scores.head.num_samples == 1


def test_a_tied_flag_beside_another_head_is_one_untied_network_under_every_stage(trained: Path) -> None:
    output = (trained / "log").read_text(encoding="utf-8")
    assert output.count("the network is untied, with the file's own lm_head") == 2
    two, three = (trained / name_of(stage, "full", "path", "flagged") for stage in ("zero2", "zero3"))
    untied = trained / name_of("zero2", "full", "path", "untied")
    assert names_in(two / "export") == names_in(three / "export") == names_in(untied / "export")
    live = [load_file(folder / "live.safetensors")["text"] for folder in (two, three, untied)]
    assert torch.allclose(live[0], live[1], atol=1e-4) and torch.equal(live[0], live[2])


@pytest.fixture(scope="module")
def reference() -> JanusModel:
    return build_reference_model()


def spoil(folder: Path, damage: str) -> None:
    """What a file system, or another version of a library, could make of an export."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    if damage == "other numbers":
        embedding[3, 5] += 1e-3
    elif damage == "are missing":
        del tensors["model.norm.weight"]
    elif damage == "that were not written":
        tensors["model.model.norm.weight"] = tensors["model.norm.weight"].clone()
    elif damage == "another shape":
        tensors["model.embed_tokens.weight"] = embedding[:-1].contiguous()
    elif damage == "truncated":
        os.truncate(file, file.stat().st_size - 4)
        return
    elif damage == "num_hidden_layers":
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        del values["text_config"]["num_hidden_layers"]
        (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage",
    ["other numbers", "are missing", "that were not written", "another shape", "truncated", "num_hidden_layers"],
)
def test_an_export_that_reads_back_otherwise_is_refused(reference: JanusModel, damage: str, tmp_path: Path) -> None:
    write_model(tmp_path, reference, reference.state_dict())
    tensors = name_for_disk(reference.state_dict(), reference.config)
    require_readable(tmp_path, tensors)
    spoil(tmp_path, damage)
    with pytest.raises(TrainingFailed, match=damage) as refused:
        require_readable(tmp_path, tensors)
    assert "janus-cluster resume" in str(refused.value.hint)


def test_an_export_with_a_tied_flag_is_read_by_its_own_head(reference: JanusModel, tmp_path: Path) -> None:
    write_model(tmp_path, reference, reference.state_dict())
    values = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": True}), encoding="utf-8")
    read = JanusModel.from_pretrained(tmp_path)
    assert not read.config.tie_word_embeddings
    assert torch.equal(read.lm_head.weight, reference.lm_head.weight)


def test_a_state_with_names_that_are_not_the_networks_is_not_written(reference: JanusModel, tmp_path: Path) -> None:
    state = reference.state_dict()
    wrapped = {name.replace("model.language_model.", "model.model."): tensor for name, tensor in state.items()}
    with pytest.raises(TrainingFailed, match=r"embed_tokens\.weight is not there"):
        write_model(tmp_path, reference, wrapped)
    assert not list(tmp_path.glob("*.safetensors"))
