"""Draws what a walker sees in a rectangular room with coloured doors: one ray per column, numpy only.

Units: metres and radians. The room spans x in [0, width] and y in [0, depth]; heading 0 looks along +y, clockwise is
positive. Wall 0 is at y = depth, 1 at x = width, 2 at y = 0, 3 at x = 0. A place on a wall is its x (0, 2) or y (1, 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HALF_FOV_RAD = math.radians(50.0)
WALL_HEIGHT_M = 2.5
EYE_HEIGHT_M = 1.25
DOOR_WIDTH_M = 1.1
DOOR_HEIGHT_M = 2.1

DOOR_RGB: dict[str, tuple[int, int, int]] = {
    "red": (215, 25, 30),
    "green": (20, 170, 50),
    "blue": (25, 70, 220),
    "yellow": (240, 205, 15),
}

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Door:
    """A door on one wall; `place_m` is where its middle stands."""

    colour: str
    wall: int
    place_m: float


@dataclass(frozen=True, slots=True)
class Room:
    """Four walls of one muted colour, a chequered floor, and two or three doors."""

    width_m: float
    depth_m: float
    wall_rgb: tuple[int, int, int]
    floor_rgb: tuple[int, int, int]
    doors: tuple[Door, ...]

    def door_xy(self, door: Door) -> tuple[float, float]:
        """Where the middle of the door stands on the floor."""
        return {
            0: (door.place_m, self.depth_m),
            1: (self.width_m, door.place_m),
            2: (door.place_m, 0.0),
            3: (0.0, door.place_m),
        }[door.wall]


@dataclass(frozen=True, slots=True)
class Pose:
    """Where the walker stands and looks."""

    x_m: float
    y_m: float
    heading_rad: float


@dataclass(frozen=True, slots=True)
class Hits:
    """Where each column's ray meets a wall."""

    wall: NDArray[np.int64]
    place_m: Array
    depth_m: Array  # along the view direction, so that straight walls stay straight


def cast_rays(room: Room, pose: Pose, width: int) -> Hits:
    """The first wall in each of `width` columns, left to right."""
    tangent = (2 * (np.arange(width) + 0.5) / width - 1) * math.tan(HALF_FOV_RAD)
    sin, cos = math.sin(pose.heading_rad), math.cos(pose.heading_rad)
    # A ray reaches depth t at pose + t * (forward + tangent * right).
    ray_x, ray_y = sin + tangent * cos, cos - tangent * sin
    depth_x = _depth_to_side(pose.x_m, ray_x, room.width_m)
    depth_y = _depth_to_side(pose.y_m, ray_y, room.depth_m)
    along_x = depth_x < depth_y
    depth = np.where(along_x, depth_x, depth_y)
    wall = np.where(along_x, np.where(ray_x > 0, 1, 3), np.where(ray_y > 0, 0, 2))
    place = np.where(along_x, pose.y_m + depth * ray_y, pose.x_m + depth * ray_x)
    return Hits(wall.astype(np.int64), place, depth)


def door_columns(room: Room, hits: Hits) -> dict[str, int]:
    """How many columns show each door, by colour."""
    return {
        door.colour: int(((hits.wall == door.wall) & (np.abs(hits.place_m - door.place_m) < DOOR_WIDTH_M / 2)).sum())
        for door in room.doors
    }


def render_view(room: Room, pose: Pose, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The view as RGB.

    Shapes:  size is (width, height); returns [height, width, 3].
    """
    width, height = size
    hits = cast_rays(room, pose, width)
    focal = width / 2 / math.tan(HALF_FOV_RAD)
    slope: Array = ((np.arange(height, dtype=np.float64) + 0.5) - height / 2)[:, None] / focal  # downwards positive
    elevation = EYE_HEIGHT_M - slope * hits.depth_m[None, :]
    image = _paint_walls(room, hits, elevation)
    floor, ceiling = elevation < 0, elevation > WALL_HEIGHT_M
    image = np.where(floor[..., None], _paint_floor(room, pose, slope, width), image)
    image = np.where(ceiling[..., None], _paint_ceiling(slope, width), image)
    return np.clip(image, 0, 255).astype(np.uint8)


def _depth_to_side(position: float, ray: Array, extent: float) -> Array:
    towards = np.where(ray > 0, extent - position, -position)
    return towards / np.where(np.abs(ray) < 1e-9, 1e-9, ray)


def _paint_walls(room: Room, hits: Hits, elevation: Array) -> Array:
    """Wall colour with skirting board and panel seams, doors over it, darker with distance."""
    place = np.broadcast_to(hits.place_m[None, :], elevation.shape)
    image = np.broadcast_to(np.array(room.wall_rgb, dtype=np.float64), (*elevation.shape, 3)).copy()
    image[np.abs((place % 1.0) - 0.5) > 0.49] *= 0.88
    image[(elevation > 0) & (elevation < 0.1)] *= 0.6
    for door in room.doors:
        _paint_door(image, door, place - door.place_m, elevation, hits.wall == door.wall)
    facing = np.where(hits.wall % 2 == 0, 1.0, 0.86)  # two walls catch less light, so that corners show
    light = facing / (1.0 + 0.06 * hits.depth_m)
    lit: Array = image * light[None, :, None]
    return lit


def _paint_door(image: Array, door: Door, offset: Array, elevation: Array, on_wall: NDArray[np.bool_]) -> None:
    """A frame, a leaf of the door's colour with two panels, and a handle."""
    half = DOOR_WIDTH_M / 2
    on_wall = np.broadcast_to(on_wall[None, :], elevation.shape)
    above_floor = on_wall & (elevation > 0)
    image[above_floor & (np.abs(offset) < half + 0.08) & (elevation < DOOR_HEIGHT_M + 0.08)] = (70, 60, 50)
    leaf = above_floor & (np.abs(offset) < half) & (elevation < DOOR_HEIGHT_M)
    image[leaf] = DOOR_RGB[door.colour]
    for low, high in ((0.2, 0.95), (1.15, 1.9)):
        panel = leaf & (np.abs(offset) < half - 0.18) & (elevation > low) & (elevation < high)
        image[panel] *= 0.85
    image[leaf & (np.abs(offset - half + 0.12) < 0.04) & (np.abs(elevation - 1.05) < 0.06)] = (235, 235, 225)


def _paint_floor(room: Room, pose: Pose, slope: Array, width: int) -> Array:
    """A chequered floor, true to the walker's place in the room."""
    depth = EYE_HEIGHT_M / np.maximum(slope, 1e-3)
    tangent = (2 * (np.arange(width) + 0.5) / width - 1)[None, :] * math.tan(HALF_FOV_RAD)
    sin, cos = math.sin(pose.heading_rad), math.cos(pose.heading_rad)
    x = pose.x_m + depth * (sin + tangent * cos)
    y = pose.y_m + depth * (cos - tangent * sin)
    dark = (np.floor(x / 0.5) + np.floor(y / 0.5)) % 2 == 0
    tile = np.where(dark, 0.82, 1.0) / (1.0 + 0.06 * depth)
    floor: Array = tile[..., None] * np.array(room.floor_rgb, dtype=np.float64)
    return floor


def _paint_ceiling(slope: Array, width: int) -> Array:
    depth = (WALL_HEIGHT_M - EYE_HEIGHT_M) / np.maximum(-slope, 1e-3)
    brightness = 232 / (1.0 + 0.05 * depth)
    return np.broadcast_to(brightness[..., None], (slope.shape[0], width, 3))
