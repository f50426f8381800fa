"""The generated walks: truthful, decidable, and written whole or not at all."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from janus_cluster.config.schema import Data
from janus_cluster.errors import UsageError
from janus_cluster.training.data.demo import main, write_demo, write_demo_episodes
from janus_cluster.training.data.demo_render import DOOR_RGB
from janus_cluster.training.data.index import load_samples

EPISODES = 16
SIZE = (160, 120)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("demo") / "walks"
    write_demo_episodes(root, num_episodes=EPISODES, seed=0, image_size=SIZE)
    return root


@pytest.fixture(scope="module")
def samples(demo):
    split = load_samples(Data(roots=[str(demo)], validation_fraction=0), seed=0)
    assert split.problems == ()
    return split.train


def columns_of(path: Path, colour: str) -> np.ndarray:
    """Columns in which the horizon row has that door's hue, whatever the light."""
    row = np.asarray(Image.open(path).convert("RGB"), dtype=float)[SIZE[1] // 2]
    hue = np.array(DOOR_RGB[colour], dtype=float)
    cosine = (row @ hue) / (np.linalg.norm(row, axis=1) * np.linalg.norm(hue) + 1e-9)
    return np.flatnonzero(cosine > 0.995)


def colour_of(sample) -> str:
    return re.fullmatch(r"Go to the (\w+) door and stop\.", sample.instruction)[1]


def test_every_episode_is_indexed_without_a_problem(samples):
    assert len({s.episode for s in samples}) == EPISODES


def test_the_four_actions_are_of_similar_frequency(samples):
    share = {action: n / len(samples) for action, n in Counter(s.action for s in samples).items()}
    assert set(share) == {0, 1, 2, 3}
    assert max(share.values()) < 0.55
    assert min(share.values()) > 0.1


def test_the_named_doors_place_in_the_pixels_tells_the_action(samples):
    for sample in samples:
        columns = columns_of(sample.frames[-1], colour_of(sample))
        assert len(columns) > 0, sample.id
        middle = (columns.min() + columns.max()) / 2 / SIZE[0]
        if sample.action == 2:
            assert middle < 0.45, sample.id
        elif sample.action == 3:
            assert middle > 0.55, sample.id
        else:
            assert 0.3 < middle < 0.7, sample.id


def test_stopping_views_show_a_larger_door_than_walking_views(samples):
    width = {a: [len(columns_of(s.frames[-1], colour_of(s))) for s in samples if s.action == a] for a in (0, 1)}
    assert np.percentile(width[0], 10) > np.percentile(width[1], 90)


def test_the_first_view_shows_another_door_on_the_other_side(samples):
    firsts = [s for s in samples if len(s.frames) == 1]
    assert len(firsts) == EPISODES
    for sample in firsts:
        assert sample.action in (2, 3)
        others = [c for c in DOOR_RGB if c != colour_of(sample)]
        middles = [
            columns_of(sample.frames[-1], c).mean() / SIZE[0] for c in others if len(columns_of(sample.frames[-1], c))
        ]
        assert any((m > 0.55) if sample.action == 2 else (m < 0.45) for m in middles), sample.id


def test_descriptions_name_the_side_on_which_the_door_is_seen(samples):
    side = {2: "on the left", 3: "on the right", 0: "ahead", 1: "ahead"}
    for sample in samples:
        assert f"{colour_of(sample)} door {side[sample.action]}" in sample.description_2d.replace("A ", "a ")


def test_subinstructions_change_after_the_turns(samples):
    for sample in samples:
        turning = sample.subinstruction.startswith("Turn ")
        if sample.action in (0, 1):
            assert sample.subinstruction == f"Walk up to the {colour_of(sample)} door and stop."
        elif turning:
            assert {2: "left", 3: "right"}[sample.action] in sample.subinstruction


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not(demo, tmp_path):
    def contents(root: Path, count: int) -> dict[str, bytes]:
        return {
            str(p.relative_to(root)): p.read_bytes()
            for folder in sorted(root.iterdir())[:count]
            for p in sorted(folder.iterdir())
        }

    write_demo_episodes(tmp_path / "same", num_episodes=2, seed=0, image_size=SIZE)
    write_demo_episodes(tmp_path / "other", num_episodes=2, seed=1, image_size=SIZE)
    assert contents(tmp_path / "same", 2) == contents(demo, 2)
    assert contents(tmp_path / "other", 2) != contents(demo, 2)


def test_command_line_writes_once_and_then_says_so(tmp_path, capsys):
    out = tmp_path / "deep" / "demo"
    assert main([str(out), "--episodes", "1"]) == 0
    assert "1 demo episodes (seed 0) written" in capsys.readouterr().out
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert main([str(out), "--episodes", "1"]) == 0
    assert "already there" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    assert json.loads((out / "demo.json").read_text())["episodes"] == 1
    assert [p.name for p in out.parent.iterdir()] == ["demo"]


def test_other_parameters_and_foreign_folders_are_refused_untouched(tmp_path, capsys):
    write_demo(tmp_path / "demo", num_episodes=1, seed=0, image_size=SIZE)
    assert main([str(tmp_path / "demo"), "--episodes", "1", "--seed", "5"]) == 2
    assert "already holds a demo of other parameters" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="already holds something else"):
        write_demo(tmp_path / "mine", num_episodes=1, seed=0, image_size=SIZE)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        write_demo(tmp_path / "file", num_episodes=1, seed=0, image_size=SIZE)


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "demo").mkdir()
    assert write_demo(tmp_path / "demo", num_episodes=1, seed=0, image_size=SIZE)
    assert (tmp_path / "demo" / "demo.json").is_file()
