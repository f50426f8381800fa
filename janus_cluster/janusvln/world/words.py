"""Instructions in several phrasings, and descriptions of what is seen."""

from __future__ import annotations

import numpy as np

from janus_cluster.janusvln.world.geometry import House, Landmark, Pose, turn_and_distance
from janus_cluster.janusvln.world.plan import AHEAD_DEG
from janus_cluster.janusvln.world.render import View

SEEN_SHARE = 0.04  # of the columns: less of a landmark is not counted as seen

ONE_GOAL = (
    "Go to the {0} and stop.",
    "Walk up to the {0}.",
    "Find the {0} and stop in front of it.",
    "Your goal is the {0}; stop when you stand in front of it.",
)
TWO_GOALS = (
    "Go to the {0}, then to the {1}.",
    "First walk up to the {0}, then go on to the {1} and stop.",
    "Visit the {0}; after that, stop in front of the {1}.",
)
HIDDEN = ("The {0} is on your {1}. ", "Turn {1} for the {0}. ")


def render_instruction(rng: np.random.Generator, goals: tuple[Landmark, ...], hidden_side: str | None) -> str:
    """One of the phrasings. `hidden_side`: where to turn first, where the first view does not show the goal."""
    phrases = ONE_GOAL if len(goals) == 1 else TWO_GOALS
    phrase, hint = phrases[int(rng.integers(len(phrases)))], HIDDEN[int(rng.integers(len(HIDDEN)))]
    names = [goal.name for goal in goals]
    where = "" if hidden_side is None else hint.format(names[0], hidden_side)
    return where + phrase.format(*names)


def render_turning(goal: Landmark, side: str) -> str:
    return f"Turn {side} until the {goal.name} is ahead."


def render_approach(goal: Landmark, *, last: bool) -> str:
    return f"Walk up to the {goal.name}{' and stop' if last else ''}."


def seen_landmarks(house: House, view: View) -> tuple[Landmark, ...]:
    """What the view shows in at least SEEN_SHARE of its columns."""
    return tuple(landmark for number, landmark in enumerate(house.landmarks) if is_seen(view, number))


def render_descriptions(house: House, pose: Pose, view: View) -> dict[str, str]:
    """What is seen, from left to right, and how far away it is, under the episode format's two keys."""
    seen = sorted(
        (*turn_and_distance(house, pose, landmark), landmark.name) for landmark in seen_landmarks(house, view)
    )
    places = [f"{_article(name)} {name} {_where(bearing)}" for bearing, _, name in seen]
    distances = [f"the {name} is {distance:.1f} m away" for _, distance, name in seen]
    ahead = wall_ahead_m(view)
    return {
        "landmark_description": f"There is {' and '.join(places) if places else 'nothing but walls'}.",
        "spatial_description": _sentence([*distances, f"straight ahead it is {ahead:.1f} m to the next surface"]),
    }


def wall_ahead_m(view: View) -> float:
    """Depth of the middle pixel, whatever it shows."""
    height, width = view.depth_m.shape
    return float(view.depth_m[height // 2, width // 2])


def is_seen(view: View, number: int) -> bool:
    """Whether landmark `number` fills enough columns to be noticed."""
    return bool((view.landmarks == number).any(axis=0).mean() >= SEEN_SHARE)


def _where(bearing_deg: float) -> str:
    if abs(bearing_deg) <= AHEAD_DEG:
        return "ahead"
    return "on the left" if bearing_deg < 0 else "on the right"


def _article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"


def _sentence(parts: list[str]) -> str:
    text = ", ".join(parts)
    return text[0].upper() + text[1:] + "."
