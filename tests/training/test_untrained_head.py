"""A run whose action head is never trained, from its export to its evaluation; and one whose split leaks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from run_files import read_metric_lines
from training_run import all_output, run_on_nodes, write_run_folder

from janus_cluster.janusvln.world.demo import write_demo_episodes
from janus_cluster.modelspec.safetensors_header import read_header
from janus_cluster.run.files import read_json, write_json_atomically
from janus_cluster.run.paths import RunDir

pytestmark = pytest.mark.train

DATA = {"history": 1, "image_width": 84, "min_pixels": 784, "num_workers": 64, "validation_fraction": 0.2}
TRAINING = {
    "per_device_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 1, "precision": "fp32",
    "gradient_checkpointing": False, "tune": {"action_head": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Of every walk there are two folders of frames."""
    folder = tmp_path_factory.mktemp("untrained")
    write_demo_episodes(folder / "demo", num_episodes=3, seed=0, image_size=(160, 120))
    for episode in list((folder / "demo").iterdir()):
        shutil.copytree(episode, episode.with_name(f"{episode.name}_again"))
    data = DATA | {"roots": [str(folder / "demo")]}
    job: dict[str, Any] = {
        "nodes": 1,
        "model": {"preset": "tiny"},
        "data": data | {"num_workers": 0},
        "training": TRAINING,
        "checkpoint": {"export_layout": "janusvln"},
    }
    run = write_run_folder(folder / "run", job)
    assert run_on_nodes("janus_cluster.training", run) == [0], all_output(run)
    # Only `eval` is to see so many loaders: nodes have the cores for them.
    values = read_json(run.bundle(1).resolved_json)
    values["job"]["data"]["num_workers"] = DATA["num_workers"]
    write_json_atomically(run.bundle(1).resolved_json, values)
    return run


def evaluate(run: RunDir, *arguments: str) -> tuple[dict[str, Any], str, str]:
    """evaluation.json, stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "janus_cluster.cli", "eval", str(run.path), "--generate", "0", "--device", "cpu",
         *arguments],
        capture_output=True, text=True, check=False, timeout=600, env=os.environ | {"COLUMNS": "120"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads((run.evaluation / "evaluation.json").read_text()), done.stdout, done.stderr


def row(table: str, name: str) -> list[str]:
    """The row's cells, its name first."""
    rows = ([cell.strip() for cell in line.strip("│").split("│")] for line in table.splitlines())
    return next(cells for cells in rows if cells[0] == name)


def test_a_head_that_was_never_trained_is_in_no_export(run: RunDir) -> None:
    for folder in (run.export, run.published_export):
        names = read_header(folder / "model.safetensors")
        assert not [name for name in names if name.startswith("action_head.")]
        assert any(name.startswith("merger.") for name in names)


def test_training_does_not_score_it(run: RunDir) -> None:
    (scores,) = (m for m in read_metric_lines(run) if m["kind"] == "eval")
    assert scores["action_accuracy"] is None and scores["num_samples"] == 0
    assert all(value > 1 for value in scores["perplexity_by_segment"].values())
    assert "training.tune.action_head is false" in all_output(run)


def test_eval_does_not_score_it_and_starts_no_more_loaders_than_there_are_cores(run: RunDir) -> None:
    evaluation, table, output = evaluate(run)
    assert "holds no action_head.*" in evaluation["head_not_scored"]
    assert (evaluation["head"]["accuracy"], evaluation["head"]["num_samples"]) == (None, 0)
    assert row(table, "samples")[1] == "not scored"
    assert "This DataLoader will create" not in output


def test_a_split_by_walk_leaks_nothing_and_the_table_shows_it(run: RunDir) -> None:
    evaluation, table, _ = evaluate(run)
    split = evaluation["split"]
    assert split["num_leaked_frames"] == split["num_shared_episodes"] == 0 < split["num_held_out_frames"]
    assert row(table, "held-out frames that are trained on")[1] == f"0 of {split['num_held_out_frames']}"


def test_an_older_split_that_leaks_is_in_evaluation_json_table_and_page(run: RunDir) -> None:
    record = read_json(run.data_json)
    write_json_atomically(run.data_json, {key: value for key, value in record.items() if key != "split"})
    try:
        evaluation, table, output = evaluate(run)
    finally:
        write_json_atomically(run.data_json, record)
    split = evaluation["split"]
    assert split["by"] == "episode" and split["num_leaked_frames"] == split["num_held_out_frames"] > 0
    assert split["num_shared_episodes"] == split["num_held_out_walks"] == 1
    assert row(table, "held-out frames that are trained on")[1].startswith(f"{split['num_leaked_frames']} of")
    assert "held-out samples leak" in output
    assert "held-out frames are trained on too" in (run.evaluation / "predictions.html").read_text()


def test_named_data_has_no_split(run: RunDir, tmp_path: Path) -> None:
    write_demo_episodes(tmp_path / "other", num_episodes=1, seed=7, image_size=(160, 120))
    evaluation, table, _ = evaluate(run, "--data", str(tmp_path / "other"))
    assert evaluation["split"] is None and "held-out frames" not in table
