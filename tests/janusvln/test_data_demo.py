"""The generated world: what is drawn, described and done follows from one geometry; folders are whole or not there."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from janus_cluster.errors import UsageError
from janus_cluster.janusvln.data.index import load_samples
from janus_cluster.janusvln.data.samples import ACTIONS
from janus_cluster.janusvln.world.demo import main, write_demo, write_demo_episodes
from janus_cluster.janusvln.world.geometry import (
    DOOR_WIDTH_M,
    TURN_DEG,
    WALL_HEIGHT_M,
    Box,
    Door,
    House,
    Pose,
    Thing,
    can_move,
    is_free,
    move,
    turn_and_distance,
)
from janus_cluster.janusvln.world.plan import is_arrived, plan_actions
from janus_cluster.janusvln.world.render import EYE_HEIGHT_M, render_view
from janus_cluster.janusvln.world.tasks import Walk, plan_walk
from janus_cluster.janusvln.world.textures import paint_scene
from janus_cluster.janusvln.world.words import render_descriptions, seen_landmarks
from janus_cluster.job.schema import Data

EPISODES = 16
SIZE = (160, 120)
CRATE = Box(2.2, 2.8, 1.7, 2.3, 0.0, 0.5)
HOUSE = House(
    width_m=4.0,
    depth_m=4.0,
    doors=(Door("red", 0, 2.0), Door("blue", 1, 1.0), Door("green", 3, 3.0)),
    things=(Thing("orange", "crate", 2.5, 2.0, CRATE, (CRATE,)),),
    look=7,
)


@pytest.fixture(scope="module")
def walks() -> list[Walk]:
    """A few walks of each level."""
    return [
        plan_walk(np.random.default_rng([5, i]), level, first_side=(-1, 1)[i % 2])
        for level, count in (("easy", 4), ("memory", 2))
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo") / "walks"
    write_demo_episodes(root, num_episodes=EPISODES, seed=0, image_size=SIZE)
    return root


def columns_of(landmarks: np.ndarray, number: int) -> np.ndarray:
    return np.flatnonzero((landmarks == number).any(axis=0))


def project(pose: Pose, point_m: tuple[float, float, float], size: tuple[int, int]) -> tuple[float, float]:
    """Column and row, in pixels from the left upper corner, at which the point appears, which is before the walker.

    90 degrees: the focal length is half the width. Two metres ahead and one to the right is a quarter from the edge.
    """
    width, height = size
    angle = np.radians(pose.heading_deg)
    dx, dy = point_m[0] - pose.x_m, point_m[1] - pose.y_m
    depth, right = dx * np.sin(angle) + dy * np.cos(angle), dx * np.cos(angle) - dy * np.sin(angle)
    return width / 2 * (1 + right / depth), height / 2 + width / 2 * (EYE_HEIGHT_M - point_m[2]) / depth


@pytest.mark.parametrize("pose", [Pose(1.1, 0.9, 20), Pose(2.6, 0.8, -15 % 360), Pose(0.7, 2.5, 47)])
def test_door_edges_are_drawn_where_their_corners_project_to(pose: Pose) -> None:
    view = render_view(paint_scene(HOUSE), pose, (320, 240))
    columns = columns_of(view.landmarks, 0)
    edges = [project(pose, (2.0 + side * DOOR_WIDTH_M / 2, 4.0, 1.9), (320, 240)) for side in (-1, 1)]
    assert columns.min() == pytest.approx(max(edges[0][0], 0), abs=1.5)
    assert columns.max() == pytest.approx(min(edges[1][0], 320) - 1, abs=1.5)


def test_a_box_is_drawn_where_its_corners_project_to_and_hides_what_is_behind() -> None:
    pose = Pose(0.5, 2.0, 90)
    view = render_view(paint_scene(HOUSE), pose, (320, 240))
    rows, columns = np.nonzero(view.landmarks == 3)
    front_left = project(pose, (2.2, 2.3, 0.0), (320, 240))
    back_right = project(pose, (2.8, 1.7, 0.5), (320, 240))
    assert columns.min() == pytest.approx(front_left[0], abs=1.5)
    assert rows.max() == pytest.approx(front_left[1] - 1, abs=1.5)
    assert rows.min() == pytest.approx(back_right[1], abs=1.5)
    assert view.depth_m[rows.max(), 160] == pytest.approx(1.7, abs=0.01)


def test_every_pixels_depth_is_on_a_surface() -> None:
    house, pose, (width, height) = HOUSE, Pose(0.9, 0.7, 33), (64, 48)
    depth = render_view(paint_scene(house), pose, (width, height)).depth_m
    tangent = 2 * (np.arange(width) + 0.5) / width - 1
    down = ((np.arange(height) + 0.5) - height / 2)[:, None] * 2 / width
    sin, cos = np.sin(np.radians(33)), np.cos(np.radians(33))
    x, y = 0.9 + depth * (sin + tangent * cos), 0.7 + depth * (cos - tangent * sin)
    z = EYE_HEIGHT_M - depth * down
    slack = 1e-3
    assert x.min() > -slack
    assert x.max() < house.width_m + slack
    assert y.min() > -slack
    assert y.max() < house.depth_m + slack
    planes = [x, x - house.width_m, y, y - house.depth_m, z, z - WALL_HEIGHT_M]
    planes += [
        plane
        for thing in house.things
        for box in thing.boxes
        for plane in (x - box.x_low_m, x - box.x_high_m, y - box.y_low_m, y - box.y_high_m, z - box.z_high_m)
    ]
    assert np.abs(planes).min(axis=0).max() < 5e-3


def test_turning_once_round_returns_to_the_same_picture_and_half_way_does_not() -> None:
    scene = paint_scene(HOUSE)
    pose = start = Pose(1.3, 1.7, 17)
    pictures = []
    for _ in range(360 // TURN_DEG):
        pictures.append(render_view(scene, pose, (64, 48)).pixels)
        pose = move(pose, "TURN_LEFT")
    assert pose == start
    assert np.array_equal(render_view(scene, pose, (64, 48)).pixels, pictures[0])
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(pictures, 2))
    assert move(move(start, "TURN_LEFT"), "TURN_RIGHT") == start


def test_descriptions_name_what_is_seen_on_which_side_and_how_far() -> None:
    pose = Pose(1.5, 1.0, 0)
    view = render_view(paint_scene(HOUSE), pose, SIZE)
    described = render_descriptions(HOUSE, pose, view)
    assert described["landmark_description"] == (
        "There is a green door on the left and a red door ahead and an orange crate on the right."
    )
    # sqrt(1.5² + 2²), sqrt(0.5² + 3²), sqrt(1² + 1²) to their middles, and 3 m to the wall
    assert described["spatial_description"] == (
        "The green door is 2.5 m away, the red door is 3.0 m away, the orange crate is 1.4 m away, "
        "straight ahead it is 3.0 m to the next surface."
    )


def test_descriptions_of_walks_hold_the_true_distances_of_what_the_pixels_show(walks: list[Walk]) -> None:
    for walk, decision in ((w, d) for w in walks for d in w.decisions):
        view = render_view(walk.scene, decision.pose, SIZE)
        described = render_descriptions(walk.house, decision.pose, view)
        named = re.findall(r"the (\w+ \w+) is ([\d.]+) m away", described["spatial_description"], re.IGNORECASE)
        true = {
            landmark.name: turn_and_distance(walk.house, decision.pose, landmark)[1]
            for landmark in seen_landmarks(walk.house, view)
        }
        assert {name: float(metres) for name, metres in named} == {n: round(d, 1) for n, d in true.items()}
        for number, landmark in enumerate(walk.house.landmarks):
            share = len(columns_of(view.landmarks, number)) / SIZE[0]
            assert (landmark.name in described["landmark_description"]) == (share >= 0.04)


def test_recorded_actions_lead_through_free_space_to_every_goal_in_turn(walks: list[Walk]) -> None:
    for walk in walks:
        pose = walk.decisions[0].pose
        for decision, after in itertools.pairwise(walk.decisions):
            assert decision.pose == pose
            if decision.action == "MOVE_FORWARD":
                assert can_move(walk.house, pose)
            pose = move(pose, decision.action)
            if after.goal != decision.goal:
                assert is_arrived(walk.house, pose, decision.goal)
        assert walk.decisions[-1].action == "STOP"
        assert [d.action for d in walk.decisions].count("STOP") == 1
        assert is_arrived(walk.house, pose, walk.decisions[-1].goal)


def fewest_by_force(house: House, start: Pose, goal: Door, limit: int) -> int | None:
    """The least number of actions by trying every sequence, shortest first."""
    poses = [start]
    for steps in range(limit + 1):
        if any(is_arrived(house, pose, goal) for pose in poses):
            return steps
        moved = (move(p, a) for p in poses for a in ACTIONS[1:] if a != "MOVE_FORWARD" or can_move(house, p))
        poses = list({(round(p.x_m, 6), round(p.y_m, 6), p.heading_deg): p for p in moved}.values())
    return None


def test_no_way_is_shorter_than_the_planned_one() -> None:
    rng = np.random.default_rng(2)
    compared = 0
    while compared < 12:
        pose = Pose(float(rng.uniform(0.3, 3.7)), float(rng.uniform(0.3, 3.7)), int(rng.integers(360)))
        goal = HOUSE.doors[int(rng.integers(3))]
        if not is_free(HOUSE, pose.x_m, pose.y_m):
            continue
        planned = plan_actions(HOUSE, pose, goal, max_steps=8)
        assert (None if planned is None else len(planned)) == fewest_by_force(HOUSE, pose, goal, 8)
        compared += planned is not None


def test_the_way_goes_round_obstacles() -> None:
    blocked = plan_actions(HOUSE, Pose(2.5, 0.9, 0), HOUSE.doors[0], max_steps=24)
    free = plan_actions(replace(HOUSE, things=()), Pose(2.5, 0.9, 0), HOUSE.doors[0], max_steps=24)
    assert blocked is not None
    assert free is not None
    assert len(blocked) > len(free)


def test_turning_comes_before_walking_where_both_are_as_short() -> None:
    actions = plan_actions(HOUSE, Pose(2.0, 2.4, 330), HOUSE.doors[0], max_steps=8)
    assert actions == ("TURN_RIGHT", "MOVE_FORWARD", "MOVE_FORWARD", "MOVE_FORWARD")


def test_a_place_without_a_way_has_none() -> None:
    wall = Box(0.0, 4.0, 1.9, 2.1, 0.0, 0.5)
    closed = replace(HOUSE, things=(Thing("black", "crate", 2.0, 2.0, wall, (wall,)),))
    assert plan_actions(closed, Pose(2.0, 1.0, 0), closed.doors[0], max_steps=14) is None


def test_plain_frames_alone_tell_the_action_as_soon_as_the_goal_is_in_view(walks: list[Walk]) -> None:
    for walk in walks:
        for decision in walk.decisions:
            bearing, distance = turn_and_distance(walk.house, decision.pose, decision.goal)
            if abs(bearing) > 15:
                assert decision.action == ("TURN_LEFT" if bearing < 0 else "TURN_RIGHT")
            else:
                assert decision.action == ("MOVE_FORWARD" if distance > 1.0 else "STOP")


def test_memory_walks_have_frames_whose_goal_only_an_earlier_frame_shows(walks: list[Walk]) -> None:
    for walk in walks[4:6]:
        shown = [
            {landmark.name for landmark in seen_landmarks(walk.house, render_view(walk.scene, d.pose, SIZE))}
            for d in walk.decisions
        ]
        last = walk.decisions[-1].goal.name
        blind = [
            i for i, d in enumerate(walk.decisions) if d.goal.name == last and last not in shown[i] and last in shown[0]
        ]
        assert len(blind) >= 2
        assert "left" not in walk.instruction
        assert "right" not in walk.instruction


def test_a_goal_that_the_first_view_does_not_show_is_named_with_its_side(walks: list[Walk]) -> None:
    for walk in walks:
        first = walk.decisions[0]
        seen = seen_landmarks(walk.house, render_view(walk.scene, first.pose, SIZE))
        named = re.search(r"\b(left|right)\b", walk.instruction)
        if first.goal in seen:
            assert named is None
        else:
            assert named is not None
            assert first.action == f"TURN_{named[1].upper()}"


def test_every_episode_is_indexed_without_a_problem_and_actions_are_balanced(demo: Path) -> None:
    split = load_samples(Data(roots=[str(demo)], validation_fraction=0), seed=0)
    assert split.problems == ()
    assert len({s.episode for s in split.train}) == EPISODES
    share = {action: n / len(split.train) for action, n in Counter(s.action for s in split.train).items()}
    assert set(share) == {0, 1, 2, 3}
    assert max(share.values()) < 0.6
    assert min(share.values()) > 0.08


def test_sub_instructions_name_the_turn_that_is_being_made(demo: Path) -> None:
    split = load_samples(Data(roots=[str(demo)], validation_fraction=0), seed=0)
    for sample in split.train:
        if named := re.match(r"Turn (left|right) until", sample.subinstruction):
            assert ACTIONS[sample.action] == f"TURN_{named[1].upper()}"
        else:
            assert sample.subinstruction.startswith("Walk up to the ")


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not(demo: Path, tmp_path: Path) -> None:
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


def test_command_line_writes_once_and_then_reports_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "demo"
    arguments = [str(out), "--episodes", "1", "--size", "96x72"]
    assert main(arguments) == 0
    assert "1 demo episodes (level easy, seed 0) written" in capsys.readouterr().out
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert main(arguments) == 0
    assert "already there" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    manifest = json.loads((out / "demo.json").read_text())
    assert manifest["parameters"] == {"episodes": 1, "seed": 0, "image_size": [96, 72], "level": "easy"}
    assert manifest["written"]["frames"] == len(list(out.rglob("*.png")))
    for path in out.rglob("*.png"):
        with Image.open(path) as image:
            assert image.size == (96, 72)
    assert [p.name for p in out.parent.iterdir()] == ["demo"]


@pytest.mark.parametrize("bad", [["--size", "320"], ["--size", "3x4"], ["--episodes", "0"], ["--level", "odd"]])
def test_wrong_options_are_refused(bad: list[str], tmp_path: Path) -> None:
    assert main([str(tmp_path / "demo"), *bad]) == 2
    assert list(tmp_path.iterdir()) == []


def test_other_parameters_and_foreign_folders_are_refused_untouched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_demo(tmp_path / "demo", num_episodes=1, seed=0)
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


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    assert write_demo(tmp_path / "demo", num_episodes=1, seed=0, image_size=SIZE) is not None
    assert (tmp_path / "demo" / "demo.json").is_file()
