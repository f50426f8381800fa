"""What a walker sees: perspective, 90 degrees wide, eye at 1.25 m, numpy only.

Shape legend: H rows, W columns. A pixel's ray is forward + tangent(column) · right - slope(row) · up, so `depth` is
measured along the view direction and straight walls stay straight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from janus_cluster.janusvln.world.geometry import WALL_HEIGHT_M, Pose
from janus_cluster.janusvln.world.textures import TEXELS_PER_M, Panel, Scene, Top

HALF_FOV_DEG = 45.0
EYE_HEIGHT_M = 1.25
NEAREST_M = 0.02
DIMMING_PER_M = 0.06

Array = NDArray[np.float32]
Texels = NDArray[np.int32]
FAR = np.float32(1e9)


@dataclass(frozen=True, slots=True)
class View:
    """One picture, the number of the landmark in each pixel (NOTHING elsewhere), and the depth of each pixel in m."""

    pixels: NDArray[np.uint8]  # [H, W, 3]
    landmarks: NDArray[np.int8]  # [H, W]
    depth_m: Array  # [H, W]


@dataclass(frozen=True, slots=True)
class Camera:
    """The rays of a pose: ray_x, ray_y [W] are what one metre of depth adds to x and y; slope [H] is downwards."""

    x_m: float
    y_m: float
    ray_x: Array
    ray_y: Array
    slope: Array

    @classmethod
    def at(cls, pose: Pose, size: tuple[int, int]) -> Camera:
        width, height = size
        half = math.tan(math.radians(HALF_FOV_DEG))
        tangent = (2 * (np.arange(width, dtype=np.float32) + 0.5) / width - 1) * half
        slope = ((np.arange(height, dtype=np.float32) + 0.5) - height / 2) * (2 * half / width)
        angle = math.radians(pose.heading_deg)
        sin, cos = math.sin(angle), math.cos(angle)
        return cls(pose.x_m, pose.y_m, _f32(sin + tangent * cos), _f32(cos - tangent * sin), _f32(slope))


def render_view(scene: Scene, pose: Pose, size: tuple[int, int]) -> View:
    """The view from `pose`. Shapes: size is (width, height)."""
    camera = Camera.at(pose, size)
    depth, texels = _draw_shell(scene, camera)
    for panel in scene.parts:
        _draw_panel(panel, camera, depth, texels)
    for top in scene.tops:
        _draw_top(top, camera, depth, texels)
    light = 1.0 / (1.0 + np.float32(DIMMING_PER_M) * depth)
    pixels = (scene.colours.take(texels, axis=0) * light[..., None]).astype(np.uint8)
    return View(pixels, scene.landmarks.take(texels), depth)


def _f32(value: NDArray[np.floating]) -> Array:
    return value.astype(np.float32)


def _hit(panel: Panel, camera: Camera) -> tuple[Array, Array]:
    """Depth and place along the panel at which each column's ray meets it, [W] each; FAR where it does not."""
    across, along = (camera.ray_y, camera.ray_x) if panel.along_x else (camera.ray_x, camera.ray_y)
    gap = panel.y_m - camera.y_m if panel.along_x else panel.x_m - camera.x_m
    start = camera.x_m - panel.x_m if panel.along_x else camera.y_m - panel.y_m
    depth = _f32(gap / np.where(np.abs(across) < 1e-7, np.float32(1e-7), across))
    place = _f32(start + depth * along)
    # A ray through a corner must meet one of its two walls, whatever the rounding.
    met = (depth > NEAREST_M) & (place >= -1e-4) & (place <= panel.length_m + 1e-4)
    return np.where(met, depth, FAR), place


def _draw_shell(scene: Scene, camera: Camera) -> tuple[Array, Texels]:
    """Depth and texel of every pixel of the bare rooms: the nearest full wall of each column, floor and ceiling."""
    hits = [_hit(panel, camera) for panel in scene.walls]
    depths = np.stack([depth for depth, _ in hits])
    nearest = depths.argmin(axis=0)
    columns = np.arange(len(nearest))
    wall_depth = depths[nearest, columns]
    place = np.stack([place for _, place in hits])[nearest, columns]
    stride = np.array([panel.stride for panel in scene.walls], np.int32)[nearest]
    first = np.array([panel.texel for panel in scene.walls], np.int32)[nearest]
    first += np.clip((place * TEXELS_PER_M).astype(np.int32), 0, stride - 1)
    z = np.float32(EYE_HEIGHT_M) - camera.slope[:, None] * wall_depth
    row = ((WALL_HEIGHT_M - z) * TEXELS_PER_M).astype(np.int32)
    np.clip(row, 0, int(WALL_HEIGHT_M * TEXELS_PER_M) - 1, out=row)
    texels = first + row * stride
    depth = np.broadcast_to(wall_depth, z.shape).copy()
    half = len(camera.slope) // 2
    ceiling_depth = (WALL_HEIGHT_M - EYE_HEIGHT_M) / -camera.slope[:half, None]
    above = z[:half] > WALL_HEIGHT_M
    np.copyto(depth[:half], ceiling_depth, where=above)
    texels[:half][above] = scene.ceiling_texel
    floor_depth = _f32(EYE_HEIGHT_M / np.maximum(camera.slope[half:, None], np.float32(1e-6)))
    below = z[half:] < 0
    np.copyto(depth[half:], floor_depth, where=below)
    np.copyto(texels[half:], _floor_texels(scene, camera, floor_depth), where=below)
    return depth, texels


def _floor_texels(scene: Scene, camera: Camera, depth: Array) -> Texels:
    # Far rows would overflow the integers; walls hide them.
    near = np.minimum(depth, np.float32(100.0))
    u = ((camera.x_m + near * camera.ray_x) * TEXELS_PER_M).astype(np.int32) % TEXELS_PER_M
    v = ((camera.y_m + near * camera.ray_y) * TEXELS_PER_M).astype(np.int32) % TEXELS_PER_M
    texels: Texels = scene.floor_texel + v * TEXELS_PER_M + u
    return texels


def _draw_panel(panel: Panel, camera: Camera, depth: Array, texels: Texels) -> None:
    """Draw the panel over everything that is farther away."""
    panel_depth, place = _hit(panel, camera)
    seen = np.flatnonzero(panel_depth < FAR)
    if not len(seen):
        return
    at = slice(int(seen[0]), int(seen[-1]) + 1)  # a straight panel covers neighbouring columns
    near = panel_depth[at]
    z = np.float32(EYE_HEIGHT_M) - camera.slope[:, None] * near
    drawn = (z >= panel.low_m) & (z < panel.high_m) & (near < depth[:, at])
    rows = math.ceil((panel.high_m - panel.low_m) * TEXELS_PER_M)
    row = np.clip(((panel.high_m - z) * TEXELS_PER_M).astype(np.int32), 0, rows - 1)
    column = np.clip((place[at] * TEXELS_PER_M).astype(np.int32), 0, panel.stride - 1)
    np.copyto(texels[:, at], panel.texel + row * panel.stride + column, where=drawn)
    np.copyto(depth[:, at], np.broadcast_to(near, drawn.shape), where=drawn)


def _draw_top(top: Top, camera: Camera, depth: Array, texels: Texels) -> None:
    """The upper side of a box that is lower than the eye."""
    drop = EYE_HEIGHT_M - top.box.z_high_m
    if drop <= 0:
        return
    corners = [(x, y) for x in (top.box.x_low_m, top.box.x_high_m) for y in (top.box.y_low_m, top.box.y_high_m)]
    farthest = max(math.hypot(x - camera.x_m, y - camera.y_m) for x, y in corners)
    begin = int(np.searchsorted(camera.slope, drop / farthest))
    if begin == len(camera.slope):
        return
    near = (np.float32(drop) / camera.slope[begin:, None]).astype(np.float32)
    x = np.float32(camera.x_m) + near * camera.ray_x
    y = np.float32(camera.y_m) + near * camera.ray_y
    drawn = (x >= top.box.x_low_m) & (x <= top.box.x_high_m) & (y >= top.box.y_low_m) & (y <= top.box.y_high_m)
    drawn &= near < depth[begin:]
    np.copyto(texels[begin:], np.int32(top.texel), where=drawn)
    np.copyto(depth[begin:], np.broadcast_to(near, drawn.shape), where=drawn)
