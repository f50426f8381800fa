"""A walk: a house, what is asked in it, and the shortest way that does it."""

from __future__ import annotations

from dataclasses import dataclass

from janus_cluster.errors import JanusError
from janus_cluster.training.data.world.geometry import (
    FORWARD_M,
    Door,
    House,
    Landmark,
    Pose,
    has_clear_line,
    move,
    turn_and_distance,
)
from janus_cluster.training.data.world.layout import LEVELS, Level, Rng, draw_house, draw_pose
from janus_cluster.training.data.world.plan import AHEAD_DEG, NEAR_M, plan_actions
from janus_cluster.training.data.world.render import HALF_FOV_DEG, render_view
from janus_cluster.training.data.world.textures import Scene, paint_scene
from janus_cluster.training.data.world.words import (
    is_seen,
    render_approach,
    render_crossing,
    render_instruction,
    render_turning,
)

# Walks with a frame closer than this to where the action changes are not used: nobody could tell.
MARGIN_DEG = 3.0
MARGIN_M = 0.08
IN_VIEW_DEG = HALF_FOV_DEG - 5.0
MAX_BEARING_DEG = 150.0  # left and right are the same distance behind
MAX_FIRST_BEARING_DEG = 110.0
MAX_SLANT_DEG = 55.0  # doors seen from the side look too narrow to judge
MAX_FORWARDS = 4  # to a goal of a plain walk: longer ones would be forward, forward, forward
POSES_PER_HOUSE = 30
MAX_HOUSES = 5_000
GLANCE_SIZE = (64, 48)  # enough to know what is in view
TURN_SIDES = {"TURN_LEFT": "left", "TURN_RIGHT": "right"}


@dataclass(frozen=True, slots=True)
class Decision:
    """One frame: where the walker stands, what it is walking to and what it does."""

    pose: Pose
    action: str
    goal: Landmark


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
    """A walk whose first goal, where the level is plain, lies to that side (-1 left, 1 right).

    Raises: JanusError if no house of MAX_HOUSES holds one.
    """
    level = LEVELS[level_name]
    num_goals = 2 if rng.random() < level.two_goals_share else 1
    for _ in range(MAX_HOUSES):
        house = draw_house(rng, level)
        if house is None or len(house.doors) < level.doors[0]:
            continue
        for _ in range(POSES_PER_HOUSE):
            goals = _draw_goals(rng, house, level, num_goals)
            pose = draw_pose(rng, house)
            if level.plain and pose is not None:
                pose = _turn_to_start(rng, house, pose, goals, first_side)
            if pose is None:
                continue
            decisions = _walk(house, pose, goals, level)
            walk = None if decisions is None else _tell(rng, house, goals, decisions, level)
            if walk is not None and walk.num_memory_frames >= level.memory_frames * (num_goals - 1):
                return walk
    raise JanusError(f"no walk of level {level_name} in {MAX_HOUSES} houses")


def _draw_goals(rng: Rng, house: House, level: Level, count: int) -> tuple[Landmark, ...]:
    if level.goal_colours:
        return house.doors[:count]
    candidates: tuple[Landmark, ...] = house.landmarks if level.things_are_goals else house.doors
    return tuple(candidates[int(i)] for i in rng.permutation(len(candidates))[:count])


def _turn_to_start(rng: Rng, house: House, pose: Pose, goals: tuple[Landmark, ...], first_side: int) -> Pose | None:
    """A heading with which a plain walk can start there, or None: not too far, and nothing given away.

    One goal: on the other side of the view stands another door, which could be meant just as well. Two goals: the
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


def _walk(house: House, start: Pose, goals: tuple[Landmark, ...], level: Level) -> tuple[Decision, ...] | None:
    """The decisions to each goal in turn and the stop, or None where there is no way or a frame is not clear."""
    decisions: list[Decision] = []
    pose = start
    for goal in goals:
        actions = plan_actions(house, pose, goal, max_steps=level.max_steps)
        if not actions or (level.plain and actions.count("MOVE_FORWARD") > MAX_FORWARDS):
            return None
        for action in actions:
            decisions.append(Decision(pose, action, goal))
            pose = move(pose, action)
    decisions.append(Decision(pose, "STOP", goals[-1]))
    judge = _is_plain if level.plain else _is_clear
    return tuple(decisions) if all(judge(house, decision) for decision in decisions) else None


def _is_clear(house: House, decision: Decision) -> bool:
    """Whether stopping here and walking on can be told apart."""
    bearing, distance = turn_and_distance(house, decision.pose, decision.goal)
    if abs(bearing) > AHEAD_DEG or not has_clear_line(house, decision.pose.x_m, decision.pose.y_m, decision.goal):
        return True
    return abs(distance - NEAR_M) >= MARGIN_M


def _is_plain(house: House, decision: Decision) -> bool:
    """Whether the action is what the goal's place in the view says, well inside its limits."""
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
    """Degrees between the look to the goal and straight at its front; 0 for things, which have no front."""
    if not isinstance(decision.goal, Door):
        return 0.0
    off = decision.pose.heading_deg + bearing_deg - 90.0 * decision.goal.wall
    return abs((off + 180.0) % 360.0 - 180.0)


def _tell(
    rng: Rng, house: House, goals: tuple[Landmark, ...], decisions: tuple[Decision, ...], level: Level
) -> Walk | None:
    """The walk in words, or None where the frames do not show what the words speak of."""
    scene = paint_scene(house)
    views = [render_view(scene, decision.pose, GLANCE_SIZE) for decision in decisions]
    seen = {goal: [is_seen(view, house.landmarks.index(goal)) for view in views] for goal in goals}
    first, last = decisions[0], goals[-1]
    begin_of_last = next(i for i, decision in enumerate(decisions) if decision.goal == last)
    if len(goals) == 2 and not any(seen[last][: 1 if level.plain else begin_of_last + 1]):
        return None
    hidden_side = None
    if not seen[goals[0]][0]:
        if (len(goals) == 2 and level.plain) or first.action not in TURN_SIDES:
            return None
        hidden_side = TURN_SIDES[first.action]
    if level.plain and any(not seen[d.goal][i] for i, d in enumerate(decisions) if _is_in_view(house, d)):
        return None
    elsewhere = house.room_of(first.pose.y_m) != house.room_of(house.position(goals[0])[1])
    texts, checkpoints = _parts(house, decisions, last, plain=level.plain)
    return Walk(
        house=house,
        scene=scene,
        instruction=render_instruction(rng, goals, hidden_side, elsewhere=elsewhere),
        subinstructions=texts,
        checkpoints=checkpoints,
        decisions=decisions,
        num_memory_frames=sum(not seen[d.goal][i] and any(seen[d.goal][:i]) for i, d in enumerate(decisions)),
    )


def _parts(
    house: House, decisions: tuple[Decision, ...], last: Landmark, *, plain: bool
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Sub-instructions, and the last frame of each but the last."""
    texts: list[str] = []
    ends: list[int] = []
    for number in range(len(decisions)):
        text = _part_of(house, decisions, number, last, plain=plain)
        if texts and texts[-1] == text:
            continue
        if texts:
            ends.append(number - 1)
        texts.append(text)
    return tuple(texts), tuple(ends)


def _part_of(house: House, decisions: tuple[Decision, ...], number: int, last: Landmark, *, plain: bool) -> str:
    """What is being done in that frame: turning to the goal, leaving the room, or walking up to the goal."""
    goal = decisions[number].goal
    leg = [i for i, decision in enumerate(decisions) if decision.goal == goal]
    leading = all(decisions[i].action in TURN_SIDES for i in leg if i <= number)
    if plain and leading:
        return render_turning(goal, TURN_SIDES[decisions[number].action])
    rooms = [house.room_of(decisions[i].pose.y_m) for i in leg if i >= number]
    return render_crossing() if len(set(rooms)) > 1 else render_approach(goal, last=goal == last)
