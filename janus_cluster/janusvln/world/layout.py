"""Random houses of a level."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from janus_cluster.janusvln.world.geometry import (
    DOOR_WIDTH_M,
    Box,
    Door,
    House,
    Pose,
    Thing,
    is_free,
)
from janus_cluster.janusvln.world.textures import DOOR_RGB, THING_RGB

Rng = np.random.Generator


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """The goals in a house. In every level each frame alone determines the action as soon as the goal is in view.

    A walk to two goals has at least `memory_frames` frames that do not show their goal, which an earlier one showed.
    The goals are the doors of `goal_colours`, in that order; any door where it is empty.
    """

    two_goals_share: float
    memory_frames: int
    goal_colours: tuple[str, ...]


LEVELS: dict[str, Level] = {
    "easy": Level(two_goals_share=0.0, memory_frames=0, goal_colours=()),
    # Always the same two, so that a network of a few thousand weights has only the remembering to learn.
    "memory": Level(two_goals_share=1.0, memory_frames=2, goal_colours=("red", "blue")),
}
# Ranges include both ends.
DOORS, THINGS = (2, 3), (0, 1)

# Outlines as (half length along the wall, half depth), and boxes in shares of them: x low, x high, y low, y high, z, z.
_SHAPES: dict[str, tuple[tuple[float, float], tuple[tuple[float, float, float, float, float, float], ...]]] = {
    "crate": ((0.25, 0.25), ((-1, 1, -1, 1, 0.0, 0.5),)),
    "cabinet": ((0.35, 0.22), ((-1, 1, -1, 1, 0.0, 1.15),)),
    "table": (
        (0.45, 0.3),
        (
            (-1, 1, -1, 1, 0.66, 0.74),
            (-1, -0.85, -1, -0.8, 0.0, 0.66),
            (0.85, 1, -1, -0.8, 0.0, 0.66),
            (-1, -0.85, 0.8, 1, 0.0, 0.66),
            (0.85, 1, 0.8, 1, 0.0, 0.66),
        ),
    ),
}
THING_FROM_DOOR_M = 0.9
PLACING_TRIES = 20


def draw_house(rng: Rng, level: Level) -> House | None:
    """A house of the level, or None where something found no place."""
    house = House(
        float(rng.uniform(3.0, 4.2)), float(rng.uniform(3.0, 4.2)), doors=(), things=(), look=int(rng.integers(2**31))
    )
    house = _with_doors(rng, house, level)
    return _with_things(rng, house, int(rng.integers(THINGS[0], THINGS[1] + 1)))


def draw_pose(rng: Rng, house: House) -> Pose | None:
    """A free position, with any heading; None where the first try is not free."""
    x, y = float(rng.uniform(0, house.width_m)), float(rng.uniform(0, house.depth_m))
    return Pose(x, y, int(rng.integers(360))) if is_free(house, x, y) else None


def _with_doors(rng: Rng, house: House, level: Level) -> House:
    """The house with as many doors as find a place, those of the goals' colours first."""
    count = int(rng.integers(DOORS[0], DOORS[1] + 1))
    others = rng.permutation([colour for colour in DOOR_RGB if colour not in level.goal_colours])
    colours = [*level.goal_colours, *(str(colour) for colour in others)]
    doors: list[Door] = []
    for _ in range(PLACING_TRIES):
        if len(doors) == count:
            break
        wall = int(rng.integers(4))
        extent = house.width_m if wall % 2 == 0 else house.depth_m
        half = DOOR_WIDTH_M / 2
        place = float(rng.uniform(half + 0.2, extent - half - 0.2))
        if all(door.wall != wall or abs(door.place_m - place) > 2 * half + 0.3 for door in doors):
            doors.append(Door(colours[len(doors)], wall, place))
    return replace(house, doors=tuple(doors))


def _with_things(rng: Rng, house: House, count: int) -> House | None:
    """The house with that many things along its walls, away from doors; None where they find no place."""
    colours = [str(colour) for colour in rng.permutation(list(THING_RGB))]
    things: list[Thing] = []
    for _ in range(PLACING_TRIES):
        if len(things) == count:
            return replace(house, things=tuple(things))
        thing = _draw_thing(rng, house, colours[len(things)])
        if _has_place(house, thing, things):
            things.append(thing)
    return None


def _draw_thing(rng: Rng, house: House, colour: str) -> Thing:
    kind = str(rng.choice(list(_SHAPES)))
    (half_length, half_depth), parts = _SHAPES[kind]
    along_x = bool(rng.random() < 0.5)
    half_x, half_y = (half_length, half_depth) if along_x else (half_depth, half_length)
    gap = 0.03
    if along_x:
        x = float(rng.uniform(half_x, house.width_m - half_x))
        y = half_y + gap if rng.random() < 0.5 else house.depth_m - half_y - gap
    else:
        x = half_x + gap if rng.random() < 0.5 else house.width_m - half_x - gap
        y = float(rng.uniform(half_y, house.depth_m - half_y))
    boxes = tuple(
        Box(x + a * half_x, x + b * half_x, y + c * half_y, y + d * half_y, low_z, high_z)
        for a, b, c, d, low_z, high_z in (part if along_x else (*part[2:4], *part[:2], *part[4:]) for part in parts)
    )
    top = max(box.z_high_m for box in boxes)
    return Thing(colour, kind, x, y, Box(x - half_x, x + half_x, y - half_y, y + half_y, 0.0, top), boxes)


def _has_place(house: House, thing: Thing, things: list[Thing]) -> bool:
    def far(x: float, y: float, metres: float) -> bool:
        return abs(x - thing.x_m) > metres or abs(y - thing.y_m) > metres

    return all(far(*house.position(door), THING_FROM_DOOR_M) for door in house.doors) and all(
        far(other.x_m, other.y_m, 1.0) for other in things
    )
