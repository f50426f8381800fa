"""Textures: every wall, door and thing of a house painted once into one atlas of texels.

A texel is 1 / TEXELS_PER_M metres wide. Beside its colour is the number of the landmark it belongs to, so that a
rendered pixel also has the landmark it shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from janus_cluster.janusvln.world.geometry import (
    DOOR_HEIGHT_M,
    DOOR_WIDTH_M,
    WALL_HEIGHT_M,
    Box,
    Door,
    House,
)

TEXELS_PER_M = 64
NOTHING = -1  # the landmark number of walls, floor and ceiling

DOOR_RGB: dict[str, tuple[int, int, int]] = {
    "red": (215, 25, 30),
    "green": (20, 170, 50),
    "blue": (25, 70, 220),
    "yellow": (240, 205, 15),
}
THING_RGB: dict[str, tuple[int, int, int]] = {
    "purple": (140, 50, 160),
    "white": (242, 242, 238),
    "black": (38, 38, 42),
    "orange": (240, 130, 30),
}
WALL_RGB = ((196, 190, 178), (178, 188, 196), (188, 196, 182), (200, 184, 184), (190, 184, 198), (205, 198, 170))
FLOOR_RGB = ((150, 120, 92), (130, 128, 124), (120, 108, 104), (158, 140, 116))
FRAME_RGB = (70, 60, 50)
HANDLE_RGB = (235, 235, 225)
CEILING_RGB = (228, 228, 226)
SIDE_LIGHT = 0.86  # walls along y catch less light, so that corners show

Pixels = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Panel:
    """A vertical rectangle from (x_m, y_m) along +x or +y; `stride` texels to a row, the upper row first."""

    x_m: float
    y_m: float
    along_x: bool
    length_m: float
    low_m: float
    high_m: float
    texel: int
    stride: int


@dataclass(frozen=True, slots=True)
class Top:
    """The upper side of a box, of one texel."""

    box: Box
    texel: int


@dataclass(frozen=True, slots=True)
class Scene:
    """A house ready to be drawn. `walls` reach from floor to ceiling, `parts` do not; one square metre of floor
    begins at `floor_texel`.
    """

    walls: tuple[Panel, ...]
    parts: tuple[Panel, ...]
    tops: tuple[Top, ...]
    floor_texel: int
    ceiling_texel: int
    colours: NDArray[np.uint8]  # [texels, 3]
    landmarks: NDArray[np.int8]  # [texels]


class Atlas:
    """Painted pieces one after another."""

    def __init__(self) -> None:
        self._colours: list[NDArray[np.uint8]] = []
        self._landmarks: list[NDArray[np.int8]] = []
        self._size = 0

    def add(self, pixels: Pixels, landmarks: NDArray[np.int8] | int = NOTHING) -> int:
        """The piece is part of the atlas. Shapes: [h, w, 3]. Returns: its first texel."""
        begin = self._size
        count = pixels.shape[0] * pixels.shape[1]
        self._colours.append(np.clip(pixels, 0, 255).astype(np.uint8).reshape(count, 3))
        numbers = np.full(count, landmarks, np.int8) if isinstance(landmarks, int) else landmarks.reshape(count)
        self._landmarks.append(numbers)
        self._size += count
        return begin

    def finish(self) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
        return np.concatenate(self._colours), np.concatenate(self._landmarks)


def paint_wall(rng: np.random.Generator, length_m: float) -> Pixels:
    """A wall of one muted tone with bricks, boards or stripes, darker below, with a skirting board."""
    tone = WALL_RGB[int(rng.integers(len(WALL_RGB)))]
    u, v = _texel_centres(length_m, WALL_HEIGHT_M)
    image = np.broadcast_to(np.array(tone, np.float32), (*np.broadcast_shapes(u.shape, v.shape), 3)).copy()
    pattern = int(rng.integers(3))
    if pattern == 0:  # bricks
        row = np.floor(v / 0.2)
        seam = (np.abs((u + 0.25 * (row % 2)) % 0.5 - 0.25) > 0.235) | (np.abs(v % 0.2 - 0.1) > 0.088)
        image[seam] *= 0.87
    elif pattern == 1:  # boards
        image[np.broadcast_to(np.abs(u % 0.6 - 0.3) > 0.28, image.shape[:2])] *= 0.84
    else:  # stripes
        image[np.broadcast_to(u % 0.5 < 0.25, image.shape[:2])] *= 0.93
    image[np.broadcast_to(v < 0.9, image.shape[:2])] *= 0.92
    image[np.broadcast_to(v < 0.1, image.shape[:2])] *= 0.6
    return image


def paint_door(image: Pixels, landmarks: NDArray[np.int8], door: Door, number: int) -> None:
    """Draw frame, leaf with two panels and handle over the wall's texels, as landmark `number`."""
    u, v = _texel_centres(image.shape[1] / TEXELS_PER_M, image.shape[0] / TEXELS_PER_M)
    offset = u - door.place_m
    half = DOOR_WIDTH_M / 2
    image[(np.abs(offset) < half + 0.07) & (v < DOOR_HEIGHT_M + 0.07)] = FRAME_RGB
    leaf = (np.abs(offset) < half) & (v < DOOR_HEIGHT_M)
    image[leaf] = DOOR_RGB[door.colour]
    for low, high in ((0.2, 0.95), (1.15, 1.9)):
        image[(np.abs(offset) < half - 0.16) & (v > low) & (v < high)] *= 0.85
    image[(np.abs(offset - half + 0.12) < 0.04) & (np.abs(v - 1.05) < 0.06)] = HANDLE_RGB
    landmarks[leaf] = number


def paint_scene(house: House) -> Scene:
    """Everything that can be seen of the house. The same house gives the same texels."""
    rng = np.random.default_rng(house.look)
    atlas = Atlas()
    walls = _paint_walls(house, atlas, rng)
    parts: list[Panel] = []
    tops: list[Top] = []
    for number, thing in enumerate(house.things, start=len(house.doors)):
        tone = np.array(THING_RGB[thing.colour], np.float32)
        for box in thing.boxes:
            parts += _box_panels(box, tone, number, atlas)
            tops.append(Top(box, atlas.add((tone * 1.05)[None, None], number)))
    floor = atlas.add(_paint_floor(rng))
    ceiling = atlas.add(np.array(CEILING_RGB, np.float32)[None, None])
    colours, landmarks = atlas.finish()
    return Scene(tuple(walls), tuple(parts), tuple(tops), floor, ceiling, colours, landmarks)


def _texel_centres(length_m: float, high_m: float) -> tuple[Pixels, Pixels]:
    """Places along a wall [1, w] and heights above its lower edge [h, 1], top first."""
    columns, rows = math.ceil(length_m * TEXELS_PER_M), math.ceil(high_m * TEXELS_PER_M)
    u = (np.arange(columns) + 0.5) / TEXELS_PER_M
    v = high_m - (np.arange(rows) + 0.5) / TEXELS_PER_M
    return u[None, :].astype(np.float32), v[:, None].astype(np.float32)


def _paint_walls(house: House, atlas: Atlas, rng: np.random.Generator) -> list[Panel]:
    panels = []
    for wall, (x, y) in enumerate(((0.0, house.depth_m), (house.width_m, 0.0), (0.0, 0.0), (0.0, 0.0))):
        along_x = wall % 2 == 0
        length = house.width_m if along_x else house.depth_m
        image = paint_wall(rng, length) * (1.0 if along_x else SIDE_LIGHT)
        numbers = np.full(image.shape[:2], NOTHING, np.int8)
        for number, door in enumerate(house.doors):
            if door.wall == wall:
                paint_door(image, numbers, door, number)
        panels.append(Panel(x, y, along_x, length, 0.0, WALL_HEIGHT_M, atlas.add(image, numbers), image.shape[1]))
    return panels


def _box_panels(box: Box, tone: Pixels, number: int, atlas: Atlas) -> list[Panel]:
    """The four upright sides of a box, with darker edges."""
    panels = []
    for x, y, along_x in (
        (box.x_low_m, box.y_low_m, True),
        (box.x_low_m, box.y_high_m, True),
        (box.x_low_m, box.y_low_m, False),
        (box.x_high_m, box.y_low_m, False),
    ):
        length = box.x_high_m - box.x_low_m if along_x else box.y_high_m - box.y_low_m
        high = box.z_high_m - box.z_low_m
        u, v = _texel_centres(length, high)
        image = np.broadcast_to(tone, (v.shape[0], u.shape[1], 3)) * np.float32(0.95 if along_x else 0.8)
        image[(u < 0.03) | (u > length - 0.03) | (v < 0.03) | (v > high - 0.03)] *= 0.7
        panels.append(Panel(x, y, along_x, length, box.z_low_m, box.z_high_m, atlas.add(image, number), image.shape[1]))
    return panels


def _paint_floor(rng: np.random.Generator) -> Pixels:
    """One square metre, to be repeated: chequered or boards."""
    tone = np.array(FLOOR_RGB[int(rng.integers(len(FLOOR_RGB)))], np.float32)
    at = (np.arange(TEXELS_PER_M) + 0.5) / TEXELS_PER_M
    if rng.random() < 0.5:
        dark = (np.floor(at / 0.5)[:, None] + np.floor(at / 0.5)[None, :]) % 2 == 0
    else:
        dark = np.broadcast_to(np.abs(at % 0.25 - 0.125)[None, :] > 0.11, (TEXELS_PER_M, TEXELS_PER_M))
    return np.where(dark, np.float32(0.82), np.float32(1.0))[..., None] * tone
