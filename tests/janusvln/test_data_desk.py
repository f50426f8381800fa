"""Warnings on a job's data before it is queued."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from data_files import make_png, write_episodes, write_json, write_r2r, write_scalevln

from janus_cluster.errors import UsageError
from janus_cluster.janusvln.data.desk import UNITS_READ, look_at_data
from janus_cluster.job.check_data import check_data
from janus_cluster.job.schema import Data, JobConfig


def write_rxr(root: Path, *, episodes: int = 60) -> Path:
    """RxR's annotation lists three languages, of which English was rendered."""
    write_r2r(root, episodes=episodes)
    records = [
        {
            "episode_id": number,
            "instruction": {"instruction_text": "Go.", "language": ("en-US", "hi-IN", "te-IN")[number % 3]},
        }
        for number in range(episodes)
    ]
    write_json(root / "train.json.gz", {"episodes": records})
    for number in range(episodes):
        if number % 3:
            shutil.rmtree(root / str(number))
    return root


def data(root: Path, **keys: object) -> Data:
    return Data.model_validate({"roots": [str(root)], **keys})


def test_more_absent_languages_than_allowed_are_refused_with_the_key_to_type(tmp_path):
    with pytest.raises(UsageError, match=r"40 of 60 trajectories \(66\.7%\).*\(hi-IN 20, te-IN 20\)") as caught:
        look_at_data(data(write_rxr(tmp_path)))
    assert "--set data.max_absent_fraction=0.67" in str(caught.value.hint)
    look = look_at_data(data(tmp_path, max_absent_fraction=0.67))
    assert "(hi-IN 20, te-IN 20): not rendered, left out" in look.warnings[0]
    assert "80 samples of all 20 records read, 0 cannot be used" in look.lines[0]


def test_absent_videos_are_counted_at_both_possible_places(tmp_path):
    root = write_scalevln(tmp_path / "data", episodes=4)
    shutil.rmtree(root / "images" / "walk_1")
    for images in (root, root / "images"):
        roots = [{"path": str(root / "annotations.json"), "images": str(images)}]
        look = look_at_data(Data.model_validate({"roots": roots}))
        assert "1 of 4 trajectories (25.0%)" in look.warnings[0]


def test_a_foreign_layout_and_a_doubtful_action_list_are_refused(tmp_path):
    (write_r2r(tmp_path / "r2r") / "train.json.gz").rename(tmp_path / "r2r" / "train_v1-3.json.gz")
    with pytest.raises(UsageError, match=r"there is train_v1-3\.json\.gz in it: give its path"):
        look_at_data(data(tmp_path / "r2r"))
    records = json.loads((write_scalevln(tmp_path / "dagger") / "annotations.json").read_text())
    write_json(tmp_path / "dagger" / "annotations.json", [r | {"actions": r["actions"][1:]} for r in records])
    with pytest.raises(UsageError, match="actions do not begin with -1"):
        look_at_data(data(tmp_path / "dagger"))


def test_of_a_large_root_a_few_episodes_are_read_and_bad_samples_are_reported(tmp_path):
    root = write_episodes(tmp_path, episodes=UNITS_READ + 12, steps=1)
    look = look_at_data(data(root))
    assert f"{UNITS_READ} samples of {UNITS_READ} of {UNITS_READ + 12} episodes read" in look.lines[0]
    assert not look.warnings
    for frame in root.rglob("*.png"):
        if frame.parent.name > "ep_3":
            frame.write_bytes(make_png(32, 24)[:-20])
    (warning,) = look_at_data(data(root)).warnings
    assert "and data.max_bad_fraction is 0.01: training is refused if it is so of all" in warning
    assert "--set data.max_bad_fraction=0." in warning and "is truncated" in warning


def test_an_empty_root_is_refused(tmp_path):
    with pytest.raises(UsageError, match="there is nothing in it") as caught:
        look_at_data(data(tmp_path))
    assert "docs/data.md" in caught.value.hint
    (tmp_path / "episode").mkdir()
    with pytest.raises(UsageError, match="no usable sample under"):
        look_at_data(data(tmp_path))


def job(root: Path) -> JobConfig:
    return JobConfig.model_validate({"name": "x", "data": {"roots": [str(root)]}})


def test_the_look_is_a_process_of_its_own_that_imports_no_torch(tmp_path):
    report = check_data(job(write_episodes(tmp_path / "data")))
    assert report.warnings == () and "12 samples of all 3 episodes read" in report.lines[0]
    with pytest.raises(UsageError, match="does not exist") as caught:
        check_data(job(tmp_path / "nowhere"))
    assert caught.value.hint
    blocked = tmp_path / "blocked"
    for name in ("torch", "transformers", "tokenizers", "deepspeed"):
        (blocked / name).mkdir(parents=True)
        (blocked / name / "__init__.py").write_text("raise ImportError('the desk has no training libraries')")
    command = [sys.executable, "-m", "janus_cluster.janusvln.data.desk"]
    environ = os.environ | {"PYTHONPATH": str(blocked)}
    text = data(tmp_path / "data").model_dump_json()
    done = subprocess.run(command, input=text, env=environ, capture_output=True, text=True, check=True, timeout=600)
    assert "12 samples" in json.loads(done.stdout)["lines"][0]


def test_a_look_that_takes_too_long_is_a_warning(tmp_path):
    report = check_data(job(write_episodes(tmp_path)), timeout_s=0.01)
    assert report.warnings == ("data: not checked: it took longer than 0.01 s; training will check it",)
