"""No frame of a held-out walk is trained on, in any roots, formats and languages of its episodes."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import write_episodes, write_json
from PIL import Image

from janus_cluster.janusvln.data.index import SampleSplit, load_samples
from janus_cluster.janusvln.data.samples import Sample
from janus_cluster.janusvln.data.split import EarlierSplit, choose_held_out, load_earlier_split, warn_of_leak
from janus_cluster.job.schema import Data
from janus_cluster.run.files import read_json, write_json_atomically
from janus_cluster.run.paths import RunDir

NUM_WALKS = 10
ACTIONS = ("MOVE_FORWARD", "TURN_LEFT", "MOVE_FORWARD", "TURN_RIGHT", "STOP")
LANGUAGES = ("en-US", "hi-IN", "te-IN")


def scene(walk: int) -> str:
    return f"scan{walk % 4}AbCd"


def write_picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((32, 24)).save(path)


def write_walk(folder: Path, walk: int, *, diverges_at: int = 99) -> None:
    """Frames of a walk, named as R2R's; from `diverges_at` on they are pictures of their own."""
    for step, action in enumerate(ACTIONS):
        apart = 10_000 if step >= diverges_at else 0
        write_picture(folder / f"step_{step:04d}_{action}.png", walk * 100 + step + apart)


def write_vlnce(root: Path, *, first_id: int, languages: Iterable[str] | None = None, **fields: Any) -> Path:
    """train.json.gz with three instructions for each walk, each rendered into a folder of its own."""
    records = []
    for walk in range(NUM_WALKS):
        for copy, language in enumerate(languages or ["", "", ""]):
            number = first_id + len(records)
            instruction = {"instruction_text": f"Walk {walk}, {copy}."} | ({"language": language} if language else {})
            record = {"episode_id": number, "instruction": instruction}
            if fields.get("numbered", True):
                record |= {"trajectory_id": 1000 + walk, "scene_id": f"mp3d/{scene(walk)}/{scene(walk)}.glb"}
            if fields.get("positions"):
                record |= {
                    "scene_id": scene(walk),
                    "reference_path": [[walk, 0.0, 1.0], [walk, 0, 2.00004 + copy / 1e6]],
                }
            records.append(record)
            write_walk(root / str(number), walk)
    write_json(root / "train.json.gz", {"episodes": records})
    return root


def write_dagger(root: Path) -> Path:
    """DAgger's copies of R2R's episodes: they leave the way after three frames."""
    records = []
    for number in range(NUM_WALKS * 3):
        walk = number // 3
        name = f"{scene(walk)}_r2r_{number + 1:06d}"
        write_walk(root / "tmp", walk, diverges_at=3)
        folder = root / "images" / name / "rgb"
        folder.mkdir(parents=True)
        for step, frame in enumerate(sorted((root / "tmp").iterdir())):
            frame.rename(folder / f"{step:03d}.png")
        records.append({"id": number, "video": f"images/{name}", "instructions": ["Go."], "actions": [-1, 1, 2, 1, 3]})
    shutil.rmtree(root / "tmp")
    write_json(root / "annotations.json", records)
    return root


def write_folders(root: Path) -> Path:
    """Episode folders, two for each walk, that name no trajectory."""
    for number in range(NUM_WALKS * 2):
        folder = root / f"{number}"
        write_walk(folder, number // 2)
        write_json(folder / "milestones_result.json", {"instruction_text": "Go.", "subinstructions": ["Go on."]})
        for frame in list(folder.glob("*.png")):
            write_json(frame.with_suffix(".json"), {"landmark_description": "A.", "spatial_description": "B."})
    return root


def write_conversations(root: Path) -> Path:
    """Upstream's file for both data sets: R2R's and RxR's episodes of one number have one id."""
    records = []
    for dataset in ("R2R", "RxR"):
        for number in range(NUM_WALKS * 3):
            # RxR numbers its walks in another order: by names alone all of them would be one.
            walk = number // 3 if dataset == "R2R" else (number * 3) % NUM_WALKS
            write_walk(root / dataset / "train" / str(number), walk)
            shown = []
            for step, action in enumerate(ACTIONS):
                shown.append(f"{dataset}/train/{number}/step_{step:04d}_{action}.png")
                value = "<image>" * step + "\n Now:<image>\n Go."
                turns = [{"from": "human", "value": value}, {"from": "gpt", "value": action}]
                records.append({"id": f"{number}/{step}", "conversations": turns, "images": list(shown)})
    return write_json(root / "train.json", records)


def load(*roots: Path, fraction: float = 0.2, seed: int = 0, earlier: EarlierSplit | None = None) -> SampleSplit:
    data = Data(roots=[str(root) for root in roots], validation_fraction=fraction)
    return load_samples(data, seed=seed, earlier=earlier)


def shown_frames(samples: Iterable[Sample]) -> tuple[set[Path], set[str]]:
    """Every frame that the samples show, by its file and by its content."""
    files = {frame.resolve() for sample in samples for frame in sample.frames}
    return files, {hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def require_no_leak(split: SampleSplit) -> None:
    assert split.held_out and split.train
    for held_out, trained in zip(shown_frames(split.held_out), shown_frames(split.train), strict=True):
        assert not held_out & trained
    assert split.split.num_leaked == 0
    assert "frames none are trained on" in split.describe()


MAKERS = {
    "R2R, three instructions a walk": lambda root: [write_vlnce(root / "r2r", first_id=1)],
    "RxR, three languages": lambda root: [write_vlnce(root / "rxr", first_id=1, languages=LANGUAGES)],
    "no trajectory ids": lambda root: [write_vlnce(root / "r2r", first_id=1, numbered=False)],
    "paths without ids": lambda root: [write_vlnce(root / "r2r", first_id=1, numbered=False, positions=True)],
    "R2R and RxR": lambda root: [
        write_vlnce(root / "r2r", first_id=1),
        write_vlnce(root / "rxr", first_id=20, languages=LANGUAGES),
    ],
    "R2R and DAgger": lambda root: [write_vlnce(root / "r2r", first_id=1), write_dagger(root / "dagger")],
    "R2R and folders": lambda root: [write_vlnce(root / "r2r", first_id=1), write_folders(root / "folders")],
    "folders twice": lambda root: [write_folders(root / "a"), write_folders(root / "b")],
    "conversations": lambda root: [write_conversations(root / "upstream")],
    "all": lambda root: [
        write_vlnce(root / "r2r", first_id=1),
        write_vlnce(root / "rxr", first_id=20, languages=LANGUAGES),
        write_dagger(root / "dagger"),
        write_folders(root / "folders"),
        write_conversations(root / "upstream"),
    ],
}


@pytest.mark.parametrize("name", MAKERS)
def test_no_held_out_frame_is_a_training_frame(tmp_path, name):
    roots = MAKERS[name](tmp_path)
    for seed in range(2):
        split = load(*roots, seed=seed)
        require_no_leak(split)
        assert split.split.num_walks == NUM_WALKS
        assert len(split.split.walks) == 2


def test_the_key_of_the_split_is_printed(tmp_path):
    output = load(write_vlnce(tmp_path / "r2r", first_id=1)).describe()
    assert "split by walk (key: trajectory and scene, or path and scene): 2 of 10 walks held out" in output
    output = load(write_vlnce(tmp_path / "plain", first_id=1, numbered=False)).describe()
    assert "split by walk (key: episode name; frames of the same content): 2 of 10 walks held out" in output


def test_frames_of_another_rendering_are_recognised_by_their_trajectory(tmp_path):
    roots = [write_vlnce(tmp_path / "a", first_id=1), write_vlnce(tmp_path / "b", first_id=500)]
    for frame in roots[1].rglob("*.png"):
        Image.open(frame).resize((64, 48)).save(frame)
    split = load(*roots)
    trajectory = {str(first + i): i // 3 for first in (1, 500) for i in range(NUM_WALKS * 3)}
    held_out, trained = ({trajectory[s.episode] for s in side} for side in (split.held_out, split.train))
    assert not held_out & trained
    assert split.split.num_walks == NUM_WALKS


def test_a_picture_that_most_walks_have_does_not_join_them(tmp_path):
    root = write_folders(tmp_path / "data")
    for folder in root.iterdir():
        Image.new("RGB", (32, 24)).save(folder / "step_0000_MOVE_FORWARD.png")
    split = load(root)
    assert split.split.num_walks == NUM_WALKS
    assert split.split.num_leaked > 0 and f"frames {split.split.num_leaked} are trained on" in split.describe()


def test_walks_of_one_name_in_two_roots_are_one_but_numbers_count_within_a_root(tmp_path):
    assert load(*(write_episodes(tmp_path / name, episodes=4) for name in "ab")).split.num_walks == 4
    assert load(*(write_episodes(tmp_path / name, episodes=4, prefix="7") for name in "cd")).split.num_walks == 4
    for name in "ef":
        root = write_episodes(tmp_path / name, episodes=4)
        for folder in list(root.iterdir()):
            folder.rename(root / folder.name.removeprefix("ep_"))
    assert load(tmp_path / "e", tmp_path / "f").split.num_walks == 8


def test_a_split_by_name_is_the_same_where_every_walk_has_one_episode(tmp_path):
    root = write_episodes(tmp_path, episodes=20)
    by_walk, by_name = load(root), load(root, earlier=EarlierSplit(by="episode"))
    assert [s.id for s in by_walk.held_out] == [s.id for s in by_name.held_out]


def run_with(split: SampleSplit | None, folder: Path) -> RunDir:
    """A run folder whose data.json has that split, or is an older version's."""
    folder.mkdir()
    record = {"schema_version": 1, "num_samples": 1, "fingerprint": "x"}
    write_json_atomically(
        RunDir(folder).data_json, record | ({"split": split.split.to_record().to_json()} if split else {})
    )
    return RunDir(folder)


def test_an_older_runs_split_is_kept_and_its_leak_is_reported(tmp_path):
    root = write_vlnce(tmp_path / "r2r", first_id=1)
    run = run_with(None, tmp_path / "run")
    split = load(root, earlier=load_earlier_split(run))
    names = [str(number) for number in range(1, NUM_WALKS * 3 + 1)]
    assert {s.episode for s in split.held_out} == choose_held_out(names, fraction=0.2, seed=0), "as it always was"
    again = load(root, earlier=load_earlier_split(run_with(split, tmp_path / "again")))
    assert [s.id for s in again.held_out] == [s.id for s in split.held_out]
    warning = warn_of_leak(split.split, run)
    assert warning is not None
    assert "6 of its held-out episodes are of walks that are trained on too, and 30 of their 30 frames" in warning
    assert f"janus-cluster submit {run.links.job_yaml}" in warning and "janus-cluster eval run --data" in warning


def test_an_older_runs_split_that_does_not_leak_is_kept_without_a_word(tmp_path):
    run = run_with(None, tmp_path / "run")
    split = load(write_folders(tmp_path / "data"), earlier=load_earlier_split(run))
    assert warn_of_leak(split.split, run) is not None, "two folders a walk"
    for folder in (tmp_path / "data").iterdir():
        if int(folder.name) % 2:
            shutil.rmtree(folder)
    split = load(tmp_path / "data", earlier=load_earlier_split(run))
    assert split.split.by == "episode" and warn_of_leak(split.split, run) is None


def test_a_run_that_goes_on_holds_out_the_same_walks_when_others_are_added(tmp_path):
    root = write_episodes(tmp_path / "data", episodes=10)
    first = load(root)
    run = run_with(first, tmp_path / "run")
    assert read_json(run.data_json)["split"]["held_out"] == list(first.split.walks)
    write_episodes(root, episodes=60)
    again = load(root, earlier=load_earlier_split(run))
    assert {s.episode for s in again.held_out} == {s.episode for s in first.held_out}
    for walk in first.split.walks:
        shutil.rmtree(root / walk)
    lost = load(root, earlier=load_earlier_split(run))
    assert len(lost.held_out) == 0
    assert "2 that were held out before are not in the data any more: " in lost.describe()
