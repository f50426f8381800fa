"""The whole of a training run on two simulated nodes: ZeRO-3, metrics, checkpoint, resume, evaluation, export."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from run_files import read_metric_lines
from training_run import NODES, all_output, run_on_nodes, write_run_folder
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from janus_cluster.janusvln.data.index import load_samples
from janus_cluster.janusvln.data.samples import ACTIONS
from janus_cluster.janusvln.model.load import load_exported
from janus_cluster.janusvln.world.demo import write_demo_episodes
from janus_cluster.job.schema import Data, Training
from janus_cluster.modelspec.safetensors_header import read_header
from janus_cluster.run.checkpoints import find_newest_complete
from janus_cluster.run.paths import RunDir

pytestmark = pytest.mark.train

MODULE = "janus_cluster.training"
SEGMENTS = {"subinstruction", "description_2d", "description_3d", "action"}


def job(episodes: Path, *, max_steps: int, profile: str = "zero3", precision: str = "fp32") -> dict[str, Any]:
    return {
        "model": {"preset": "tiny"},
        "data": {
            "roots": [str(episodes)], "history": 1, "image_width": 84, "min_pixels": 784, "num_workers": 0,
            "validation_fraction": 0.25,
        },
        "training": {
            "per_device_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": max_steps,
            "learning_rate": 1e-3, "precision": precision, "gradient_checkpointing": precision == "bf16",
            "evaluate_every_steps": 2,
        },
        "deepspeed": {"profile": profile},
        "checkpoint": {"every_steps": 2, "keep_last": 2, "export_layout": "janusvln"},
    }  # fmt: skip


@pytest.fixture(scope="module")
def episodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "demo"
    write_demo_episodes(root, num_episodes=8, seed=0, image_size=(160, 120))
    return root


@pytest.fixture(scope="module")
def trained(episodes: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Five steps under ZeRO-3; then, as if the first attempt had died in its last checkpoint, a second attempt."""
    run = write_run_folder(tmp_path_factory.mktemp("runs") / "run", job(episodes, max_steps=5))
    assert run_on_nodes(MODULE, run) == [0, 0], all_output(run)
    (run.checkpoints / "checkpoint-5" / "manifest.json").unlink()
    assert run_on_nodes(MODULE, run, attempt=run.begin_attempt()) == [0, 0], all_output(run, attempt=2)
    return run


def test_resume_does_the_lost_step_again_with_the_same_result(trained: RunDir) -> None:
    steps = [m for m in read_metric_lines(trained) if m["kind"] == "train"]
    assert [(m["attempt"], m["step"]) for m in steps] == [(1, 1), (1, 2), (1, 3), (1, 4), (1, 5), (2, 5)]
    lost, again = steps[-2:]
    for value in ("loss", "loss_text", "loss_action", "learning_rate", "grad_norm", "epoch", "total_steps"):
        assert again[value] == pytest.approx(lost[value], rel=1e-5), value
    output = trained.rank_log(2, NODES[0], 0).read_text()
    assert "resuming from" in output and "the training data changed" not in output
    assert trained.data_json.exists()


def test_a_step_is_described_by_loss_parts_rate_and_speed(trained: RunDir) -> None:
    step = next(m for m in read_metric_lines(trained) if m["kind"] == "train" and m["step"] == 2)
    assert step["loss"] == pytest.approx(step["loss_text"] + step["loss_action"], rel=1e-4)
    assert set(step["loss_segments"]) == SEGMENTS and all(value > 0 for value in step["loss_segments"].values())
    assert step["grad_norm"] > 0 and step["learning_rate"] > 0
    assert step["samples_per_s"] == pytest.approx(8 / step["step_time_s"])
    assert step["num_tokens"] > 8 * 50 and 0 <= step["padding_share"] < 0.2


def test_the_first_step_of_every_attempt_reports_the_parts_of_its_start(trained: RunDir) -> None:
    starts = [m for m in read_metric_lines(trained) if m["kind"] == "start"]
    assert [(m["attempt"], m["step"]) for m in starts] == [(1, 1), (2, 5)]
    for start in starts:
        parts = start["seconds"]
        assert list(parts) == [
            "launch", "imports", "process_group", "resume", "index", "tokens", "weights", "engine", "first_batch",
            "first_step",
        ]  # fmt: skip
        assert start["total_s"] == pytest.approx(sum(parts.values()), abs=0.01)
        assert all(seconds >= 0 for seconds in parts.values()) and parts["imports"] > 0.5 and parts["first_step"] > 0
    assert (
        f"first step done {starts[0]['total_s']:.1f} s after the start" in trained.rank_log(1, NODES[0], 0).read_text()
    )


def test_held_out_accuracy_is_over_every_held_out_sample_once(trained: RunDir) -> None:
    log = trained.rank_log(1, NODES[0], 0).read_text()
    evaluations = [m for m in read_metric_lines(trained) if m["kind"] == "eval"]
    assert [(m["attempt"], m["step"]) for m in evaluations] == [(1, 2), (1, 4), (1, 5), (2, 5)]
    assert len({m["num_samples"] for m in evaluations}) == 1
    assert f"held out {evaluations[0]['num_samples']} samples" in log
    assert 0 <= evaluations[0]["action_accuracy"] <= 1
    assert 0.25 <= evaluations[0]["majority_accuracy"] < 1
    assert f"(majority class {evaluations[0]['majority_accuracy']:.2f}, {evaluations[0]['majority_action']}" in log
    assert f"  {'MOVE_FORWARD':<14}" in log, "the table of all actions ends the log"
    last, again = evaluations[-2:]
    assert set(last["f1_by_action"]) == set(ACTIONS) and 0 <= last["macro_f1"] <= 1
    assert all(value > 1 for value in last["perplexity_by_segment"].values())
    # The second attempt never evaluated on its way to step 5: doing so changes nothing in training.
    assert again["perplexity_by_segment"] == pytest.approx(last["perplexity_by_segment"], rel=1e-5)


def test_eval_of_the_run_agrees_with_training(trained: RunDir) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "janus_cluster.cli", "eval", str(trained.path), "--generate", "1",
         "--max-new-tokens", "4", "--device", "cpu"],
        capture_output=True, text=True, check=False, timeout=600, env=os.environ | {"COLUMNS": "120"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "index checked in" in done.stderr and " read in " not in done.stderr, "the run's own index is used"
    output = [m for m in read_metric_lines(trained) if m["kind"] == "eval"][-1]
    found = json.loads((trained.evaluation / "evaluation.json").read_text())
    assert found["head"]["num_samples"] == output["num_samples"] and found["held_out_only"]
    assert found["head"]["accuracy"] == output["action_accuracy"] and found["head"]["macro_f1"] == output["macro_f1"]
    assert found["perplexity_by_segment"] == pytest.approx(output["perplexity_by_segment"], rel=1e-4)
    assert found["generated"]["num_samples"] == 1
    for words in ("action accuracy", "macro F1", "MOVE_FORWARD", "predictions.html"):
        assert words in done.stdout


def test_the_newest_checkpoints_are_kept_and_whole(trained: RunDir) -> None:
    assert find_newest_complete(trained.checkpoints) == trained.checkpoints / "checkpoint-5"
    assert sorted(p.name for p in trained.checkpoints.iterdir()) == ["checkpoint-4", "checkpoint-5"]
    saved = [
        (m["attempt"], m["step"], Path(m["path"]).name) for m in read_metric_lines(trained) if m["kind"] == "checkpoint"
    ]
    assert saved == [(1, 2, "checkpoint-2"), (1, 4, "checkpoint-4"), (1, 5, "checkpoint-5"), (2, 5, "checkpoint-5")]


def test_export_loads_with_and_without_our_class(trained: RunDir) -> None:
    janus = load_exported(trained.export, device="cpu", dtype=torch.float32)
    plain, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(trained.export, output_loading_info=True)
    assert not info["missing_keys"]
    shared = dict(janus.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, shared[name]), name
    assert len(AutoTokenizer.from_pretrained(trained.export)) <= janus.config.text_config.vocab_size
    assert (trained.export / "preprocessor_config.json").is_file()
    exports = [m for m in read_metric_lines(trained) if m["kind"] == "export"]
    assert [m["step"] for m in exports] == [5, 5]
    assert not [p for p in trained.path.iterdir() if p.name.startswith(".export")], "no temporary folder is left"


def test_the_published_layout_is_beside_the_export_where_the_job_asks_for_it(trained: RunDir) -> None:
    names, own = (read_header(folder / "model.safetensors") for folder in (trained.published_export, trained.export))
    assert {name for name in names if not name.startswith("vggt.")} == own.keys()
    assert "vggt.aggregator.camera_token" in names


def test_exported_weights_are_the_trained_ones(trained: RunDir) -> None:
    exported = load_exported(trained.export, device="cpu", dtype=torch.float32).state_dict()
    optimizer_states = list((trained.checkpoints / "checkpoint-5").rglob("*optim_states.pt"))
    assert len(optimizer_states) == 2, "each rank has its own part of the optimizer"
    master_sum = sum(
        float(flat.detach().double().sum())
        for path in optimizer_states
        for flat in torch.load(path, weights_only=False)["optimizer_state_dict"]["fp32_flat_groups"]
    )
    frozen = ("model.visual.blocks.", "model.visual.patch_embed.")
    exported_sum = sum(float(t.double().sum()) for name, t in exported.items() if not name.startswith(frozen))
    assert exported_sum == pytest.approx(master_sum, rel=1e-6, abs=1e-3)


def test_zero3_shards_weights_from_the_disk_while_they_are_read(
    trained: RunDir, episodes: Path, tmp_path: Path
) -> None:
    """As every real run does: in bf16, from a folder of weights. The tiny preset's own are sharded later."""
    settings = job(episodes, max_steps=1, precision="bf16") | {"checkpoint": {"export": False}}
    settings["model"]["path"] = str(trained.export)
    settings["data"]["validation_fraction"] = 0.0
    run = write_run_folder(tmp_path / "run", settings)
    assert run_on_nodes(MODULE, run) == [0, 0], all_output(run)
    (step,) = [m for m in read_metric_lines(run) if m["kind"] == "train"]
    assert 0 < step["loss"] < 100
    assert "0 newly initialised" in run.rank_log(1, NODES[0], 0).read_text(encoding="utf-8")


def test_each_rank_has_its_own_log_and_only_rank_0_prints_the_steps(trained: RunDir) -> None:
    first, second = (trained.rank_log(1, node, rank).read_text() for rank, node in enumerate(NODES[:2]))
    assert "step 5/5 loss " in first and "step_time_s" in first
    assert "rank 1 of 2" in second and "step 1/5" not in second
    assert "it/s]" not in first + second, "no progress bars"


def test_a_checkpoint_holds_what_resuming_needs_and_nothing_twice(trained: RunDir) -> None:
    checkpoint = trained.checkpoints / "checkpoint-5"
    assert not list(checkpoint.rglob("*.safetensors")), "the weights are in the engine's own shards"
    states = torch.load(next(checkpoint.rglob("zero_pp_rank_0_*model_states.pt")), weights_only=False)
    names = states["module"].keys()
    assert any(name.startswith("model.visual.merger.") for name in names)
    assert not [name for name in names if name.startswith("model.visual.blocks.")], "frozen"


def test_adapters_in_bf16_under_zero2_train_resume_and_are_merged(episodes: Path, tmp_path: Path) -> None:
    """Recomputation, a loader process and a growing weight of the action loss take part too."""
    settings = job(episodes, max_steps=3, profile="zero2", precision="bf16")
    settings["data"]["num_workers"] = 1
    settings["training"] |= {"lora": {"enabled": True, "rank": 4}, "action_loss_ramp_steps": 4}
    run = write_run_folder(tmp_path / "run", settings)
    assert run_on_nodes(MODULE, run) == [0, 0], all_output(run)
    (run.checkpoints / "checkpoint-3" / "manifest.json").unlink()
    assert run_on_nodes(MODULE, run, attempt=run.begin_attempt()) == [0, 0], all_output(run, attempt=2)
    steps = [m for m in read_metric_lines(run) if m["kind"] == "train"]
    assert [(m["attempt"], m["step"]) for m in steps] == [(1, 1), (1, 2), (1, 3), (2, 3)]
    assert steps[3]["loss"] == pytest.approx(steps[2]["loss"], rel=1e-6)
    for step in steps:
        ramped = (step["step"] - 1) / 4
        assert step["loss"] == pytest.approx(step["loss_text"] + ramped * step["loss_action"], rel=1e-3)
    names = torch.load(next(run.checkpoints.rglob("mp_rank_00_model_states.pt")), weights_only=False)["module"].keys()
    assert sum("lora_" in name for name in names) == 16
    assert not [name for name in names if "mlp" in name and "language_model" in name], "the base is frozen"
    weights = load_exported(run.export, device="cpu", dtype=torch.bfloat16)
    assert all(torch.isfinite(p).all() for p in weights.parameters())


def test_a_held_out_sample_that_is_too_long_ends_the_run_before_the_model_is_built(tmp_path: Path) -> None:
    root = tmp_path / "demo"
    write_demo_episodes(root, num_episodes=8, seed=0, image_size=(160, 120))
    settings = job(root, max_steps=2) | {"nodes": 1}
    settings["data"]["max_length"] = 2_000
    data = Data.model_validate(settings["data"])
    held_out = load_samples(data, seed=Training().seed).held_out[0]
    described = held_out.frames[-1].with_suffix(".json")
    words = " ".join(str(number) for number in random.Random(0).sample(range(10**9), 3_000))
    described.write_text(json.dumps(json.loads(described.read_text()) | {"landmark_description": words}))
    run = write_run_folder(tmp_path / "runs" / "run", settings)
    assert run_on_nodes(MODULE, run) == [1]
    log = run.rank_log(1, NODES[0], 0).read_text()
    assert re.search(r"1 of \d+ held-out samples have more tokens than data\.max_length \(2000\)", log), log
    assert held_out.id in log and "learning rate" not in log
    assert not list(read_metric_lines(run))


def test_an_error_on_one_rank_ends_both_agents_and_is_in_that_ranks_log(episodes: Path, tmp_path: Path) -> None:
    run = write_run_folder(tmp_path / "run", job(episodes, max_steps=2) | {"data": {"roots": [str(tmp_path / "no")]}})
    assert 0 not in run_on_nodes(MODULE, run)
    log = run.rank_log(1, NODES[1], 1).read_text()
    assert "UsageError" in log and str(tmp_path / "no") in log
    assert not list(read_metric_lines(run))
