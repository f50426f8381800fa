"""The published layout: what transformers 4.50 itself, from the registry, makes of it, and what we do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from published_reader import TEXT
from safetensors.torch import load_file, save_file
from training_run import resolve

from janus_cluster.errors import UsageError
from janus_cluster.janusvln.data.index import load_samples
from janus_cluster.janusvln.data.tokenizer import load_tokenizer, write_processing_files
from janus_cluster.janusvln.model.janus import JanusModel
from janus_cluster.janusvln.model.load import load_exported, write_vggt
from janus_cluster.janusvln.world.demo import write_demo_episodes
from janus_cluster.job.schema import Model
from janus_cluster.modelspec.check_weights import check_weights
from janus_cluster.modelspec.networks import PRESETS
from janus_cluster.modelspec.safetensors_header import read_header
from janus_cluster.run.paths import RunDir
from janus_cluster.training.entry import build_job_model, load_job_tokenizer
from janus_cluster.training.export import write_model
from janus_cluster.training.published import write_published
from janus_cluster.training.subject import load_subject, write_preparation
from janus_cluster.training.world import World
from tests.conftest import not_tested

pytestmark = pytest.mark.train

# What the published evaluator pins, and what that release needs; torch and the rest are this Python's own.
PINNED = (
    "transformers==4.50.0", "tokenizers==0.21.1", "huggingface-hub==0.30.2",
    "requests", "urllib3", "certifi", "idna", "charset-normalizer",
)  # fmt: skip
READER = Path(__file__).with_name("published_reader.py")


@pytest.fixture(scope="module")
def old_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a venv of its own with transformers 4.50. Without a package registry: not tested."""
    venv = tmp_path_factory.mktemp("venv") / "transformers-4.50"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=600)
    python = venv / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", *PINNED]
    done = subprocess.run(install, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode != 0:
        not_tested(f"transformers 4.50 could not be installed: {done.stderr.strip().splitlines()[-1:]}")
    (site,) = venv.glob("lib/python*/site-packages")
    # Behind the venv's own packages, so those win.
    (site / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


@pytest.fixture(scope="module")
def episodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "demo"
    write_demo_episodes(root, num_episodes=1, seed=0, image_size=(160, 120))
    return root


def write_run(path: Path, episodes: Path, *, tied: bool, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run folder whose export was never trained, its VGGT in a file of its own as after a run with vggt_path."""
    monkeypatch.setitem(PRESETS, "tiny", replace(PRESETS["tiny"], tie_word_embeddings=tied))
    data = {"roots": [str(episodes)], "history": 1, "image_width": 84, "min_pixels": 784, "validation_fraction": 0}
    run = RunDir(path)
    run.export.mkdir(parents=True)
    settings = {"nodes": 1, "model": {"preset": "tiny", "vggt_path": str(path / "VGGT-1B")}, "data": data}
    resolved = resolve(settings | {"training": {"precision": "fp32"}}, run_dir=path)
    run.bundle(1).path.mkdir(parents=True)
    run.bundle(1).resolved_json.write_text(resolved.model_dump_json(), encoding="utf-8")
    job = resolved.job.model_copy(update={"model": resolved.job.model.model_copy(update={"vggt_path": None})})
    tokenizer = load_job_tokenizer(job, load_samples(job.data, seed=0))
    model = build_job_model(job, tokenizer, World(0, 0, 1, torch.device("cpu"))).eval()
    write_model(run.export, model, model.state_dict())
    write_processing_files(run.export, tokenizer=tokenizer, data=job.data)
    write_preparation(run.export, resolved.job)
    (path / "VGGT-1B").mkdir()
    vggt = load_file(write_vggt(model, path))
    # As the published file: with the last blocks and other heads too.
    spare = {f"aggregator.{kind}.2.norm1.weight": torch.ones(32) for kind in ("frame_blocks", "global_blocks")}
    save_file(vggt | spare | {"camera_head.token": torch.ones(1)}, path / "VGGT-1B" / "model.safetensors")
    return run


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def published(request: pytest.FixtureRequest, episodes: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run and its published layout: of the untied network as training writes it, of the tied one by the command."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run = write_run(home / "runs" / "mine-20261121-aaaa", episodes, tied=request.param, monkeypatch=monkeypatch)
    write_published(run.export, run.published_export)
    return run


def is_tied(run: RunDir) -> bool:
    return bool(json.loads((run.export / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"])


def test_vggt_is_inside_and_the_other_names_are_the_hubs(published: RunDir) -> None:
    names = read_header(published.published_export / "model.safetensors")
    assert {name: shape for name, shape in names.items() if not name.startswith("vggt.")} == read_header(
        published.export / "model.safetensors"
    )
    inside = {name.removeprefix("vggt.") for name in names if name.startswith("vggt.")}
    stored = set(read_header(published.path / "VGGT-1B" / "model.safetensors"))
    assert inside == {name for name in stored if name.startswith("aggregator.")} and len(inside) == len(stored) - 1


def test_transformers_4_50_reads_sizes_rope_tokenizer_and_weights(
    published: RunDir, old_python: Path, tmp_path: Path
) -> None:
    Image.effect_mandelbrot((84, 84), (-3, -2.5, 2, 2.5), 100).convert("RGB").save(tmp_path / "picture.png")
    folder, out = published.published_export, tmp_path / "out"
    command = [str(old_python), str(READER), str(folder), str(tmp_path / "picture.png"), str(out)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    facts: dict[str, Any] = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert facts["transformers"] == "4.50.0"

    config = facts["config"]
    assert (config["hidden_size"], config["num_hidden_layers"], config["num_key_value_heads"]) == (64, 2, 2)
    assert config["rope_scaling"]["mrope_section"] == [2, 3, 3] and config["rope_theta"] == 1e6
    assert config["vision_config"]["depth"] == 2 and config["vision_config"]["window_size"] == 56
    assert config["use_vggt_feature"] and config["lam"] == 0.2 and config["reference_frame"] == "first"
    assert facts["tied"] == config["tie_word_embeddings"] == is_tied(published)

    tokenizer = load_tokenizer(published.export)
    assert facts["ids"] == tokenizer(TEXT)["input_ids"]
    assert facts["decoded"] == TEXT.replace("<|im_end|>", "")
    assert facts["prompt"].startswith("<|im_start|>system\nYou are a visual") and "<|image_pad|>" in facts["prompt"]
    assert facts["pixel_limits"] == [28 * 28, 1605632]

    assert not facts["missing"]
    assert all(name.startswith(("vggt.", "merger.", "action_head.")) for name in facts["unexpected"])
    read = load_file(out.with_suffix(".safetensors"))
    logits = read.pop("logits")
    model = JanusModel.from_pretrained(published.export).eval()
    types = (read["input_ids"] == model.config.image_token_id).long()
    with torch.no_grad():
        ours = model(**read, mm_token_type_ids=types).logits
    assert torch.allclose(ours, logits, atol=1e-5), float((ours - logits).abs().max())


def test_we_read_it_as_the_export_itself(published: RunDir) -> None:
    folder = published.published_export
    lines = check_weights(Model(preset="tiny", path=str(folder)))
    assert "0 newly initialised (none)" in lines[0] and f"vggt: {folder}: 110 tensors taken" in lines[1]
    one = load_exported(folder, device="cpu", dtype=torch.float32)
    other = load_exported(published.export, vggt_path=published.path / "VGGT-1B", device="cpu", dtype=torch.float32)
    assert (one.lm_head.weight is one.get_input_embeddings().weight) == is_tied(published)
    for ours, theirs in ((one.state_dict(), other.state_dict()), (one.vggt.state_dict(), other.vggt.state_dict())):
        assert ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(published.export).get_vocab()
    assert load_tokenizer(folder).chat_template == load_tokenizer(published.export).chat_template


def test_eval_takes_vggt_from_inside_the_folder(published: RunDir, episodes: Path) -> None:
    subject = load_subject(published.published_export, roots=[str(episodes)])
    assert (
        subject.vggt_path == published.published_export
        and subject.data.history == 1
        and len(subject.load_samples().samples)
    )
    assert load_subject(published.export, roots=[str(episodes)]).vggt_path == published.path / "VGGT-1B"


def test_the_command_writes_it_once_and_overwrites_nothing(published: RunDir, tmp_path: Path) -> None:
    def export() -> subprocess.CompletedProcess[str]:
        argv = ["export", str(published.path), "--out", str(tmp_path / "out"), "--json"]
        return subprocess.run(
            [sys.executable, "-m", "janus_cluster.cli", *argv],
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )

    done = export()
    assert done.returncode == 0, done.stderr
    reported = json.loads(done.stdout)
    assert reported["path"] == str(tmp_path / "out") and reported["layout"] == "janusvln"
    assert reported["files_bytes"].keys() == {p.name for p in published.published_export.iterdir()}
    again = export()
    assert again.returncode == 2 and "is not empty" in again.stderr


def test_a_missing_vggt_is_named_and_nothing_is_left_behind(published: RunDir, tmp_path: Path) -> None:
    shutil.copytree(published.export, tmp_path / "export")
    record = json.loads((tmp_path / "export" / "janus_data.json").read_text(encoding="utf-8"))
    (tmp_path / "export" / "janus_data.json").write_text(json.dumps(record | {"vggt_path": None}), encoding="utf-8")
    with pytest.raises(UsageError, match="holds no aggregator") as refused:
        write_published(tmp_path / "export", tmp_path / "out")
    assert "--vggt-path" in str(refused.value.hint)
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_a_folder_that_is_no_trained_model_is_refused(published: RunDir, tmp_path: Path) -> None:
    shutil.copytree(published.export, tmp_path / "export")
    file = tmp_path / "export" / "model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if not name.startswith("merger.")}, file)
    with pytest.raises(UsageError, match=r"weights are not there: merger\.ln_q\.weight"):
        write_published(tmp_path / "export", tmp_path / "out")
