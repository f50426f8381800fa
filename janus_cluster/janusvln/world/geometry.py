"""A house of one room, and the places of its things.

Units: metres, whole degrees. x points right, y forward, z up. Heading 0 looks along +y, clockwise is positive. Wall 0
is at the far end, then clockwise: 1 at x = width, 2 at y = 0, 3 at x = 0. A place on a wall is its x (0, 2) or its y
(1, 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

WALL_HEIGHT_M = 2.5
DOOR_WIDTH_M, DOOR_HEIGHT_M = 0.9, 2.1
BODY_RADIUS_M = 0.2

TURN_DEG = 30
FORWARD_M = 0.25
ACTIONS = ("TURN_LEFT", "TURN_RIGHT", "MOVE_FORWARD")  # the moves; STOP is none


@dataclass(frozen=True, slots=True)
class Pose:
    """The walker's position and heading."""

    x_m: float
    y_m: float
    heading_deg: int


@dataclass(frozen=True, slots=True)
class Box:
    """An axis-aligned block."""

    x_low_m: float
    x_high_m: float
    y_low_m: float
    y_high_m: float
    z_low_m: float
    z_high_m: float


@dataclass(frozen=True, slots=True)
class Door:
    """A closed door in one of the four walls; `place_m` is the place of its middle."""

    colour: str
    wall: int
    place_m: float

    @property
    def name(self) -> str:
        return f"{self.colour} door"


@dataclass(frozen=True, slots=True)
class Thing:
    """A piece of furniture around (x_m, y_m), made of boxes; `footprint` cannot be walked through."""

    colour: str
    kind: str
    x_m: float
    y_m: float
    footprint: Box
    boxes: tuple[Box, ...]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"


Landmark = Door | Thing


@dataclass(frozen=True, slots=True)
class House:
    """One room. `look` chooses the surfaces."""

    width_m: float
    depth_m: float
    doors: tuple[Door, ...]
    things: tuple[Thing, ...]
    look: int

    @property
    def landmarks(self) -> tuple[Landmark, ...]:
        return (*self.doors, *self.things)

    def position(self, landmark: Landmark) -> tuple[float, float]:
        """The position of the landmark's middle on the floor."""
        if isinstance(landmark, Thing):
            return (landmark.x_m, landmark.y_m)
        place = landmark.place_m
        return ((place, self.depth_m), (self.width_m, place), (place, 0.0), (0.0, place))[landmark.wall]


def turn_and_distance(house: House, pose: Pose, landmark: Landmark) -> tuple[float, float]:
    """Bearing of the landmark's middle in degrees, right positive, in [-180, 180), and its distance in metres."""
    x, y = house.position(landmark)
    dx, dy = x - pose.x_m, y - pose.y_m
    degrees = math.degrees(math.atan2(dx, dy)) - pose.heading_deg
    return (degrees + 180.0) % 360.0 - 180.0, math.hypot(dx, dy)


def move(pose: Pose, action: str) -> Pose:
    """The pose after the action, even through walls; STOP changes nothing."""
    if action == "MOVE_FORWARD":
        angle = math.radians(pose.heading_deg)
        return Pose(pose.x_m + FORWARD_M * math.sin(angle), pose.y_m + FORWARD_M * math.cos(angle), pose.heading_deg)
    turn = {"TURN_LEFT": -TURN_DEG, "TURN_RIGHT": TURN_DEG}.get(action, 0)
    return Pose(pose.x_m, pose.y_m, (pose.heading_deg + turn) % 360)


def is_free(house: House, x_m: float, y_m: float) -> bool:
    """Whether a walker fits there, with BODY_RADIUS_M on each side."""
    r = BODY_RADIUS_M
    if not (r <= x_m <= house.width_m - r and r <= y_m <= house.depth_m - r):
        return False
    for thing in house.things:
        box = thing.footprint
        if box.x_low_m - r < x_m < box.x_high_m + r and box.y_low_m - r < y_m < box.y_high_m + r:
            return False
    return True


def can_move(house: House, pose: Pose) -> bool:
    """Whether a step forward stays free on its way and at its end; a step is shorter than any obstacle is wide."""
    end = move(pose, "MOVE_FORWARD")
    return is_free(house, end.x_m, end.y_m) and is_free(house, (pose.x_m + end.x_m) / 2, (pose.y_m + end.y_m) / 2)
