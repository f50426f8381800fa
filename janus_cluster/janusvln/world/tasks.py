"""A walk: a house, what is asked in it, and the shortest way that does it."""

from __future__ import annotations

from dataclasses import dataclass

from janus_cluster.errors import JanusError
from janus_cluster.janusvln.world.geometry import (
    FORWARD_M,
    Door,
    House,
    Pose,
    move,
    turn_and_distance,
)
from janus_cluster.janusvln.world.layout import DOORS, LEVELS, Level, Rng, draw_house, draw_pose
from janus_cluster.janusvln.world.plan import AHEAD_DEG, NEAR_M, plan_actions
from janus_cluster.janusvln.world.render import HALF_FOV_DEG, render_view
from janus_cluster.janusvln.world.textures import Scene, paint_scene
from janus_cluster.janusvln.world.words import (
    is_seen,
    render_approach,
    render_instruction,
    render_turning,
)

# Walks with a frame closer than this to where the action changes are not used: the action would be ambiguous.
MARGIN_DEG = 3.0
MARGIN_M = 0.08
IN_VIEW_DEG = HALF_FOV_DEG - 5.0
MAX_BEARING_DEG = 150.0  # left and right are the same distance behind
MAX_FIRST_BEARING_DEG = 110.0
MAX_SLANT_DEG = 55.0  # doors seen from the side look too narrow to judge
MAX_FORWARDS = 4  # to a goal: longer ones would be forward, forward, forward
MAX_STEPS = 12
POSES_PER_HOUSE = 30
MAX_HOUSES = 5_000
GLANCE_SIZE = (64, 48)  # enough to know what is in view
TURN_SIDES = {"TURN_LEFT": "left", "TURN_RIGHT": "right"}


@dataclass(frozen=True, slots=True)
class Decision:
    """One frame: the walker's pose, its present goal and its action."""

    pose: Pose
    action: str
    goal: Door


@dataclass(frozen=True, slots=True)
class Walk:
    """`checkpoints[i]` is the last frame of sub-instruction i; the last one runs to the end.

    `num_memory_frames`: frames that do not show their goal, which an earlier one showed.
    """

    house: House
    scene: Scene
    instruction: str
    subinstructions: tuple[str, ...]
    checkpoints: tuple[int, ...]
    decisions: tuple[Decision, ...]
    num_memory_frames: int


def plan_walk(rng: Rng, level_name: str, *, first_side: int) -> Walk:
    """A walk whose first goal is on that side (-1 left, 1 right).

    Raises: JanusError if no house of MAX_HOUSES holds one.
    """
    level = LEVELS[level_name]
    num_goals = 2 if rng.random() < level.two_goals_share else 1
    for _ in range(MAX_HOUSES):
        house = draw_house(rng, level)
        if house is None or len(house.doors) < DOORS[0]:
            continue
        for _ in range(POSES_PER_HOUSE):
            goals = _draw_goals(rng, house, level, num_goals)
            pose = draw_pose(rng, house)
            if pose is not None:
                pose = _turn_to_start(rng, house, pose, goals, first_side)
            if pose is None:
                continue
            decisions = _walk(house, pose, goals)
            walk = None if decisions is None else _describe_walk(rng, house, goals, decisions)
            if walk is not None and walk.num_memory_frames >= level.memory_frames * (num_goals - 1):
                return walk
    raise JanusError(f"no walk of level {level_name} in {MAX_HOUSES} houses")


def _draw_goals(rng: Rng, house: House, level: Level, count: int) -> tuple[Door, ...]:
    if level.goal_colours:
        return house.doors[:count]
    return tuple(house.doors[int(i)] for i in rng.permutation(len(house.doors))[:count])


def _turn_to_start(rng: Rng, house: House, pose: Pose, goals: tuple[Door, ...], first_side: int) -> Pose | None:
    """A heading with which a walk can start there, or None: not too far, and nothing given away.

    One goal: on the other side of the view is another door, which could be meant just as well. Two goals: the
    first view shows both, for later the second is to be found from memory.
    """
    direction, distance = turn_and_distance(house, Pose(pose.x_m, pose.y_m, 0), goals[0])
    if not NEAR_M < distance < NEAR_M + MAX_FORWARDS * FORWARD_M:
        return None
    limits = (0.0, IN_VIEW_DEG) if len(goals) == 2 else (AHEAD_DEG, MAX_FIRST_BEARING_DEG)
    heading = round(direction - first_side * rng.uniform(*limits)) % 360
    turned = Pose(pose.x_m, pose.y_m, heading)
    others = [turn_and_distance(house, turned, d)[0] for d in (house.doors if len(goals) == 1 else goals[1:])]
    if len(goals) == 2:
        return turned if abs(others[0]) < IN_VIEW_DEG else None
    return turned if any(-IN_VIEW_DEG < other * first_side < 0 for other in others) else None


def _walk(house: House, start: Pose, goals: tuple[Door, ...]) -> tuple[Decision, ...] | None:
    """The decisions to each goal in turn and the stop, or None where there is no way or a frame is not clear."""
    decisions: list[Decision] = []
    pose = start
    for goal in goals:
        actions = plan_actions(house, pose, goal, max_steps=MAX_STEPS)
        if not actions or actions.count("MOVE_FORWARD") > MAX_FORWARDS:
            return None
        for action in actions:
            decisions.append(Decision(pose, action, goal))
            pose = move(pose, action)
    decisions.append(Decision(pose, "STOP", goals[-1]))
    return tuple(decisions) if all(_is_plain(house, decision) for decision in decisions) else None


def _is_plain(house: House, decision: Decision) -> bool:
    """Whether the goal's place in the view determines the action, well inside its limits."""
    bearing, distance = turn_and_distance(house, decision.pose, decision.goal)
    if abs(abs(bearing) - AHEAD_DEG) < MARGIN_DEG or abs(bearing) > MAX_BEARING_DEG:
        return False
    if abs(bearing) > AHEAD_DEG:
        reading = "TURN_LEFT" if bearing < 0 else "TURN_RIGHT"
    elif abs(distance - NEAR_M) < MARGIN_M:
        return False
    else:
        reading = "MOVE_FORWARD" if distance > NEAR_M else "STOP"
    if reading != decision.action:
        return False
    return abs(bearing) > IN_VIEW_DEG or _slant(decision, bearing) < MAX_SLANT_DEG


def _is_in_view(house: House, decision: Decision) -> bool:
    return abs(turn_and_distance(house, decision.pose, decision.goal)[0]) < IN_VIEW_DEG


def _slant(decision: Decision, bearing_deg: float) -> float:
    """Degrees between the look to the goal and straight at its front."""
    off = decision.pose.heading_deg + bearing_deg - 90.0 * decision.goal.wall
    return abs((off + 180.0) % 360.0 - 180.0)


def _describe_walk(rng: Rng, house: House, goals: tuple[Door, ...], decisions: tuple[Decision, ...]) -> Walk | None:
    """The walk as text, or None where the frames do not show what the text describes."""
    scene = paint_scene(house)
    views = [render_view(scene, decision.pose, GLANCE_SIZE) for decision in decisions]
    seen = {goal: [is_seen(view, house.landmarks.index(goal)) for view in views] for goal in goals}
    first, last = decisions[0], goals[-1]
    if len(goals) == 2 and not seen[last][0]:
        return None
    hidden_side = None
    if not seen[goals[0]][0]:
        if len(goals) == 2 or first.action not in TURN_SIDES:
            return None
        hidden_side = TURN_SIDES[first.action]
    if any(not seen[d.goal][i] for i, d in enumerate(decisions) if _is_in_view(house, d)):
        return None
    texts, checkpoints = _parts(decisions, last)
    return Walk(
        house=house,
        scene=scene,
        instruction=render_instruction(rng, goals, hidden_side),
        subinstructions=texts,
        checkpoints=checkpoints,
        decisions=decisions,
        num_memory_frames=sum(not seen[d.goal][i] and any(seen[d.goal][:i]) for i, d in enumerate(decisions)),
    )


def _parts(decisions: tuple[Decision, ...], last: Door) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Sub-instructions, and the last frame of each but the last."""
    texts: list[str] = []
    ends: list[int] = []
    for number in range(len(decisions)):
        text = _part_of(decisions, number, last)
        if texts and texts[-1] == text:
            continue
        if texts:
            ends.append(number - 1)
        texts.append(text)
    return tuple(texts), tuple(ends)


def _part_of(decisions: tuple[Decision, ...], number: int, last: Door) -> str:
    """What is being done in that frame: turning to the goal, or walking up to it."""
    goal = decisions[number].goal
    before = [decision for decision in decisions[: number + 1] if decision.goal == goal]
    if all(decision.action in TURN_SIDES for decision in before):
        return render_turning(goal, TURN_SIDES[decisions[number].action])
    return render_approach(goal, last=goal == last)
