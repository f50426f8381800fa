"""Writes demo episodes: short walks through small rooms to the door that the instruction names.

    python -m janus_cluster.training.data.demo OUT --episodes 24 --seed 0

The rule that a person can read off each frame: turn towards the named door until it is ahead (within 10 degrees),
walk until it is near (1.1 m), stop. The first view of every walk shows a second door on the other side, so without the
instruction nobody knows which way to turn. Needs numpy and pillow only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from janus_cluster.errors import JanusError, UsageError
from janus_cluster.training.data.demo_render import (
    DOOR_RGB,
    DOOR_WIDTH_M,
    Door,
    Pose,
    Room,
    cast_rays,
    door_columns,
    render_view,
)
from janus_cluster.training.data.episodes import MILESTONES_NAME

MANIFEST_NAME = "demo.json"
DEMO_VERSION = 1

TURN_DEG = 20.0
AHEAD_DEG = 10.0  # half a turn: after the last turn the door is always ahead
FORWARD_M = 0.6
NEAR_M = 1.1
MARGIN_DEG = 3.0  # walks with a frame that is closer than this to either threshold are not used: nobody could tell
MARGIN_M = 0.12
MAX_BEARING_DEG = 45.0  # the door's middle stays inside the 100-degree view
MAX_SLANT_DEG = 50.0  # doors seen from the side look too narrow to judge
MIN_FORWARD, MAX_FORWARD = 0.5, 3.0  # short walks keep the four actions of similar frequency
MAX_STEPS = 8
THIRD_DOOR_SHARE = 0.5
MAX_ATTEMPTS = 100_000

# Turns at the start, negative to the left: in turn, so that left and right are equally frequent.
FIRST_TURNS = (-2, 1, 2, -1)
MUTED_WALLS = ((196, 190, 178), (178, 188, 196), (188, 196, 182), (200, 184, 184), (190, 184, 198), (205, 198, 170))
MUTED_FLOORS = ((150, 120, 92), (130, 128, 124), (120, 108, 104), (158, 140, 116))

Rng = np.random.Generator


@dataclass(frozen=True, slots=True)
class Decision:
    """One frame of a walk: where the walker stands and what is done there."""

    pose: Pose
    action: str


@dataclass(frozen=True, slots=True)
class Walk:
    """A room, the door to go to, and the decisions that lead there."""

    room: Room
    target: Door
    decisions: tuple[Decision, ...]


def bearing_and_distance(room: Room, pose: Pose, door: Door) -> tuple[float, float]:
    """Bearing of the door's middle in degrees, right positive, in (-180, 180], and its distance in metres."""
    x, y = room.door_xy(door)
    dx, dy = x - pose.x_m, y - pose.y_m
    degrees = math.degrees(math.atan2(dx, dy) - pose.heading_rad)
    return (degrees + 180.0) % 360.0 - 180.0, math.hypot(dx, dy)


def choose_action(bearing_deg: float, distance_m: float) -> str:
    """What the walker does: turn to the door, walk to it, stop in front of it."""
    if bearing_deg < -AHEAD_DEG:
        return "TURN_LEFT"
    if bearing_deg > AHEAD_DEG:
        return "TURN_RIGHT"
    return "MOVE_FORWARD" if distance_m > NEAR_M else "STOP"


def plan_walk(rng: Rng, *, target_colour: str, first_turns: int) -> Walk:
    """A walk to a door of that colour that begins with that many turns, each decision clear from its frame.

    On the other side of the first view stands a rival door, which could be walked to just as well.
    """
    for _ in range(MAX_ATTEMPTS):
        scene = _draw_scene(rng, target_colour, first_turns)
        if scene is None:
            continue
        room, start = scene
        target, rival = room.doors[:2]
        decisions = _walk_to(room, target, start)
        if decisions is not None and _walk_to(room, rival, start) is not None:
            return Walk(room, target, decisions)
    raise JanusError(f"no clear walk to a {target_colour} door in {MAX_ATTEMPTS} attempts")


def write_demo_episodes(root: Path, *, num_episodes: int, seed: int, image_size: tuple[int, int] = (320, 240)) -> int:
    """Episode folders lie under `root`; the same arguments give the same pixels. Returns: frames written."""
    frames = 0
    colours = tuple(DOOR_RGB)
    for index in range(num_episodes):
        rng = np.random.default_rng([seed, index])
        # The colour moves on one more after each round of turns, so that every colour meets every turn.
        colour = colours[(index + index // len(FIRST_TURNS)) % len(colours)]
        walk = plan_walk(rng, target_colour=colour, first_turns=FIRST_TURNS[index % len(FIRST_TURNS)])
        _write_episode(root / f"demo_{index:04d}_{colour}", walk, image_size)
        frames += len(walk.decisions)
    return frames


def write_demo(root: Path, *, num_episodes: int, seed: int, image_size: tuple[int, int] = (320, 240)) -> bool:
    """The demo lies under `root`, whole or not at all. Returns: False if it was there already.

    Raises: UsageError if `root` holds anything else, a demo of other parameters included.
    """
    manifest = {
        "generator": "janus-cluster demo",
        "version": DEMO_VERSION,
        "episodes": num_episodes,
        "seed": seed,
        "image_size": list(image_size),
    }
    if _holds_same_demo(root, manifest):
        return False
    root.parent.mkdir(parents=True, exist_ok=True)
    building = root.parent / f".{root.name}.building-{os.getpid()}"
    try:
        building.mkdir()
        write_demo_episodes(building, num_episodes=num_episodes, seed=seed, image_size=image_size)
        _write_json(building / MANIFEST_NAME, manifest)
        building.replace(root)
    except OSError as error:
        if _holds_same_demo(root, manifest):  # another process was faster
            return False
        raise UsageError(f"{root}: the demo data cannot be written ({error})") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return True


def _holds_same_demo(root: Path, manifest: dict[str, Any]) -> bool:
    if not root.exists():
        return False
    if not root.is_dir():
        raise UsageError(f"{root} is a file, expected a folder or nothing")
    if not any(root.iterdir()):
        return False
    try:
        found = json.loads((root / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found != manifest:
        what = f"a demo of other parameters: {found}" if isinstance(found, dict) else "something else"
        raise UsageError(f"{root} already holds {what}", hint="name an empty or a new folder, or remove this one")
    return True


def _draw_scene(rng: Rng, target_colour: str, first_turns: int) -> tuple[Room, Pose] | None:
    """A room, its first door the target and its second the rival, and a start; None where a door has no place."""
    width, depth = float(rng.uniform(3.6, 5.2)), float(rng.uniform(3.6, 5.2))
    wall_rgb = MUTED_WALLS[int(rng.integers(len(MUTED_WALLS)))]
    floor_rgb = MUTED_FLOORS[int(rng.integers(len(MUTED_FLOORS)))]
    empty = Room(width, depth, wall_rgb, floor_rgb, ())
    x, y = float(rng.uniform(0.5, width - 0.5)), float(rng.uniform(0.5, depth - 0.5))
    start = Pose(x, y, float(rng.uniform(-math.pi, math.pi)))
    rival_turns = int(rng.integers(1, 3)) * (-1 if first_turns > 0 else 1)
    bearings = [_draw_bearing(rng, first_turns), _draw_bearing(rng, rival_turns)]
    if rng.random() < THIRD_DOOR_SHARE:
        bearings.append(float(rng.uniform(-180.0, 180.0)))
    others = [colour for colour in DOOR_RGB if colour != target_colour]
    rng.shuffle(others)
    doors = [_place_door(empty, start, b, c) for b, c in zip(bearings, [target_colour, *others], strict=False)]
    placed = tuple(door for door in doors if door is not None)
    room = Room(width, depth, wall_rgb, floor_rgb, placed)
    return (room, start) if len(placed) == len(doors) and _doors_apart(room) else None


def _draw_bearing(rng: Rng, turns: int) -> float:
    """Degrees to a door that is that many turns away and inside the view."""
    spread = AHEAD_DEG - MARGIN_DEG
    bearing = abs(turns) * TURN_DEG + float(rng.uniform(-spread, spread))
    return math.copysign(min(bearing, MAX_BEARING_DEG), turns)


def _place_door(room: Room, pose: Pose, bearing_deg: float, colour: str) -> Door | None:
    """A door where the look in that direction meets a wall, or None where a corner is too near."""
    ray = cast_rays(room, Pose(pose.x_m, pose.y_m, pose.heading_rad + math.radians(bearing_deg)), 1)
    wall, place = int(ray.wall[0]), float(ray.place_m[0])
    extent = room.width_m if wall % 2 == 0 else room.depth_m
    margin = DOOR_WIDTH_M / 2 + 0.2
    return Door(colour, wall, place) if margin < place < extent - margin else None


def _walk_to(room: Room, target: Door, start: Pose) -> tuple[Decision, ...] | None:
    """The decisions from `start` to the stop, or None where the room, the start or a frame is not fit."""
    forwards = (bearing_and_distance(room, start, target)[1] - NEAR_M) / FORWARD_M
    if not MIN_FORWARD < forwards < MAX_FORWARD:
        return None
    decisions: list[Decision] = []
    pose = start
    while len(decisions) < MAX_STEPS:
        if not _is_clear(room, pose, target):
            return None
        action = choose_action(*bearing_and_distance(room, pose, target))
        decisions.append(Decision(pose, action))
        if action == "STOP":
            return tuple(decisions)
        pose = _move(pose, action)
    return None


def _doors_apart(room: Room) -> bool:
    doors = room.doors
    return not any(
        a.wall == b.wall and abs(a.place_m - b.place_m) < DOOR_WIDTH_M + 0.4
        for i, a in enumerate(doors)
        for b in doors[i + 1 :]
    )


def _is_clear(room: Room, pose: Pose, target: Door) -> bool:
    """Whether the frame lies well inside one action, and the door is seen from its front."""
    bearing, distance = bearing_and_distance(room, pose, target)
    if abs(abs(bearing) - AHEAD_DEG) < MARGIN_DEG:
        return False
    if abs(bearing) < AHEAD_DEG and abs(distance - NEAR_M) < MARGIN_M:
        return False
    inward = {0: 0.0, 1: 90.0, 2: 180.0, 3: 270.0}[target.wall]
    slant = (math.degrees(pose.heading_rad) + bearing - inward + 180.0) % 360.0 - 180.0
    return abs(slant) < MAX_SLANT_DEG


def _move(pose: Pose, action: str) -> Pose:
    if action == "MOVE_FORWARD":
        x = pose.x_m + FORWARD_M * math.sin(pose.heading_rad)
        return Pose(x, pose.y_m + FORWARD_M * math.cos(pose.heading_rad), pose.heading_rad)
    turn = math.radians(TURN_DEG)
    return Pose(pose.x_m, pose.y_m, pose.heading_rad + (turn if action == "TURN_RIGHT" else -turn))


def _write_episode(folder: Path, walk: Walk, image_size: tuple[int, int]) -> None:
    folder.mkdir(parents=True)
    colour = walk.target.colour
    turns = next(i for i, d in enumerate(walk.decisions) if not d.action.startswith("TURN"))
    approach = f"Walk up to the {colour} door and stop."
    side = "left" if walk.decisions[0].action == "TURN_LEFT" else "right"
    turning = [f"Turn {side} until the {colour} door is ahead."] if turns else []
    milestones = {
        "instruction_text": f"Go to the {colour} door and stop.",
        "subinstructions": [*turning, approach],
        "completion_checkpoints": [{"checkpoint_frame_index": turns - 1}] if turns else [],
    }
    _write_json(folder / MILESTONES_NAME, milestones)
    for number, decision in enumerate(walk.decisions):
        stem = f"step_{number:04d}_{decision.action}"
        Image.fromarray(render_view(walk.room, decision.pose, image_size)).save(folder / f"{stem}.png")
        _write_json(folder / f"{stem}.json", _describe(walk.room, decision.pose, image_size[0]))


def _describe(room: Room, pose: Pose, columns: int) -> dict[str, str]:
    """What is seen, in the words of the real data's two keys. A door counts as seen from 4 % of the columns on."""
    hits = cast_rays(room, pose, columns)
    shown = door_columns(room, hits)
    seen = [door for door in room.doors if shown[door.colour] >= 0.04 * columns]
    placed = sorted((*bearing_and_distance(room, pose, door), door.colour) for door in seen)
    landmarks = [f"a {colour} door {_where(bearing)}" for bearing, _, colour in placed]
    distances = [f"the {colour} door is {distance:.1f} m away" for _, distance, colour in placed]
    wall_m = float(hits.depth_m[columns // 2])
    return {
        "landmark_description": _sentence("There is " + " and ".join(landmarks) if landmarks else "There is no door"),
        "spatial_description": _sentence(", ".join([*distances, f"the wall ahead is {wall_m:.1f} m away"])),
    }


def _where(bearing_deg: float) -> str:
    if abs(bearing_deg) <= AHEAD_DEG:
        return "ahead"
    return "on the left" if bearing_deg < 0 else "on the right"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m janus_cluster.training.data.demo", description="Write demo episodes"
    )
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--episodes", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.episodes < 1 or options.seed < 0:
        parser.error("--episodes must be 1 or more and --seed 0 or more")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns: the exit code."""
    options = _parse_arguments(arguments)
    try:
        made = write_demo(options.out, num_episodes=options.episodes, seed=options.seed)
    except JanusError as error:
        print(f"error: {error.message}" + (f"\n  hint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return error.exit_code
    said = "written" if made else "already there"
    print(f"{options.out}: {options.episodes} demo episodes (seed {options.seed}) {said}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
