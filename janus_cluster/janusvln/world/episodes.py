"""Episodes of the generated world that a policy walks: it sees a frame, names an action, and the world moves on.

Units: metres. A walk ends with STOP or after `max_steps` actions; a step forward into a wall or a thing moves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from janus_cluster.janusvln.world.geometry import ACTIONS, FORWARD_M, Door, Pose, can_move, move, turn_and_distance
from janus_cluster.janusvln.world.plan import is_arrived, plan_actions
from janus_cluster.janusvln.world.render import render_view
from janus_cluster.janusvln.world.tasks import MAX_STEPS, Walk
from janus_cluster.run.records.training import Outcome

STOP = "STOP"


class RoomEpisode:
    """One walk, from its first frame to its end."""

    def __init__(self, walk: Walk, *, image_size: tuple[int, int], max_steps: int) -> None:
        self._walk, self._image_size, self._max_steps = walk, image_size, max_steps
        self._goals: tuple[Door, ...] = tuple(dict.fromkeys(d.goal for d in walk.decisions))
        self.instruction = walk.instruction
        self.actions: list[str] = []
        self._pose: Pose = walk.decisions[0].pose
        self._path_m = 0.0
        self._num_reached = 0
        self._note_arrival()

    @property
    def is_over(self) -> bool:
        return len(self.actions) >= self._max_steps or STOP in self.actions[-1:]

    def view(self) -> NDArray[np.uint8]:
        """What the walker sees now. Shapes: [H, W, 3]."""
        return render_view(self._walk.scene, self._pose, self._image_size).pixels

    def step(self, action: str) -> None:
        """Do the action. Raises: ValueError for one that there is not, or after the end."""
        if self.is_over or action not in (*ACTIONS, STOP):
            raise ValueError(f"action {action!r}: the episode is over" if self.is_over else f"no action {action!r}")
        self.actions.append(action)
        if action != "MOVE_FORWARD":
            self._pose = move(self._pose, action)
        elif can_move(self._walk.house, self._pose):
            self._pose = move(self._pose, action)
            self._path_m += FORWARD_M
        self._note_arrival()

    def outcome(self) -> Outcome:
        """How it has gone so far."""
        shortest = [decision.action for decision in self._walk.decisions if decision.action != STOP]
        has_stopped = STOP in self.actions[-1:]
        is_last = self._num_reached >= len(self._goals) - 1
        return Outcome(
            is_success=has_stopped and is_last and is_arrived(self._walk.house, self._pose, self._goals[-1]),
            was_there=self._num_reached == len(self._goals),
            has_stopped=has_stopped,
            steps=len(self.actions),
            shortest_steps=len(shortest) + 1,
            path_m=self._path_m,
            shortest_m=FORWARD_M * shortest.count("MOVE_FORWARD"),
            error_m=turn_and_distance(self._walk.house, self._pose, self._goals[-1])[1],
        )

    def shortest_action(self) -> str:
        """The next action of a shortest way to what is still to be done; STOP where there is none."""
        goal = self._goals[min(self._num_reached, len(self._goals) - 1)]
        return (*(plan_actions(self._walk.house, self._pose, goal, max_steps=4 * MAX_STEPS) or ()), STOP)[0]

    def _note_arrival(self) -> None:
        while self._num_reached < len(self._goals) and is_arrived(
            self._walk.house, self._pose, self._goals[self._num_reached]
        ):
            self._num_reached += 1


def _choose_at_random(seed: int) -> Callable[[RoomEpisode], str]:
    rng = np.random.default_rng(seed)
    return lambda _: str(rng.choice([*ACTIONS, STOP]))


# What bounds a policy from below and from above: each makes, of a seed, what chooses an episode's next action.
REFERENCES: Mapping[str, Callable[[int], Callable[[RoomEpisode], str]]] = {
    "random": _choose_at_random,
    "shortest path": lambda _: RoomEpisode.shortest_action,
}


def walk_to_end(episode: RoomEpisode, choose: Callable[[RoomEpisode], str]) -> Outcome:
    """The outcome of the episode with these actions."""
    while not episode.is_over:
        episode.step(choose(episode))
    return episode.outcome()
