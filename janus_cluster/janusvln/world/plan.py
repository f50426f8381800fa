"""Shortest ways through a house, over poses: one turn or one step costs 1.

Headings are the start's plus multiples of 30 degrees, so the reachable points form a lattice, and A* over it is exact.
Among the ways with the fewest actions the one that turns earliest is taken: face it, then walk.
"""

from __future__ import annotations

import heapq
import math
from itertools import count

from janus_cluster.janusvln.world.geometry import (
    ACTIONS,
    FORWARD_M,
    House,
    Landmark,
    Pose,
    can_move,
    move,
    turn_and_distance,
)

NEAR_M = 1.0
AHEAD_DEG = 15.0  # half a turn: after the last turn the goal is always ahead
MAX_EXPANDED = 60_000

Key = tuple[float, float, int]


def is_arrived(house: House, pose: Pose, goal: Landmark) -> bool:
    """Whether the walker is in front of the goal: near, and facing it."""
    bearing, distance = turn_and_distance(house, pose, goal)
    return distance <= NEAR_M and abs(bearing) <= AHEAD_DEG


def plan_actions(house: House, start: Pose, goal: Landmark, *, max_steps: int) -> tuple[str, ...] | None:
    """The fewest turns and steps after which `is_arrived` holds, or None where max_steps do not suffice."""
    goal_x, goal_y = house.position(goal)
    order = count()
    # (steps + least steps that remain, steps at which turns are made added up, steps, …)
    frontier = [(_least_steps(start, goal_x, goal_y), 0, 0, next(order), start)]
    best: dict[Key, tuple[int, int]] = {_key(start): (0, 0)}
    reached_from: dict[Key, tuple[Key, str]] = {}
    for _ in range(MAX_EXPANDED):
        if not frontier:
            return None
        _, lateness, steps, _, pose = heapq.heappop(frontier)
        key = _key(pose)
        if (steps, lateness) > best[key]:
            continue
        if is_arrived(house, pose, goal):
            return _trace(reached_from, key)
        for action in ACTIONS:
            if action == "MOVE_FORWARD" and not can_move(house, pose):
                continue
            after = move(pose, action)
            cost = (steps + 1, lateness + (0 if action == "MOVE_FORWARD" else steps))
            after_key = _key(after)
            if after_key in best and best[after_key] <= cost:
                continue
            least = cost[0] + _least_steps(after, goal_x, goal_y)
            if least > max_steps:
                continue
            best[after_key] = cost
            reached_from[after_key] = (key, action)
            heapq.heappush(frontier, (least, cost[1], cost[0], next(order), after))
    return None


def _least_steps(pose: Pose, goal_x: float, goal_y: float) -> int:
    """Lower bound of the steps forward: those without any obstacle."""
    away = math.hypot(goal_x - pose.x_m, goal_y - pose.y_m) - NEAR_M
    return max(0, math.ceil(away / FORWARD_M - 1e-6))


def _key(pose: Pose) -> Key:
    return (round(pose.x_m, 4), round(pose.y_m, 4), pose.heading_deg)


def _trace(reached_from: dict[Key, tuple[Key, str]], key: Key) -> tuple[str, ...]:
    actions = []
    while key in reached_from:
        key, action = reached_from[key]
        actions.append(action)
    return tuple(reversed(actions))
