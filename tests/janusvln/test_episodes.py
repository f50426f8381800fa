"""Walks of the generated world that a policy makes, and how they are scored."""

from __future__ import annotations

import math

import pytest

from janus_cluster.janusvln.navigation import measure_mean, measure_rate, score_navigation
from janus_cluster.janusvln.world.demo import draw_walk
from janus_cluster.janusvln.world.episodes import REFERENCES, RoomEpisode, walk_to_end
from janus_cluster.run.records.training import Outcome

SIZE = (64, 48)


def episode(index: int, *, level: str = "easy", max_steps: int = 40) -> RoomEpisode:
    return RoomEpisode(draw_walk(seed=5, index=index, level=level), image_size=SIZE, max_steps=max_steps)


@pytest.mark.slow
@pytest.mark.parametrize(("level", "num"), [("easy", 20), ("memory", 4)])
def test_a_random_policy_and_the_shortest_way_bound_any_other(level: str, num: int) -> None:
    scores = {}
    for name, make in REFERENCES.items():
        choose = make(0)
        scores[name] = score_navigation([walk_to_end(episode(i, level=level), choose) for i in range(num)])
    best, chance = scores["shortest path"], scores["random"]
    assert best.success_rate.mean == best.spl.mean == best.oracle_success_rate.mean == 1.0
    assert chance.success_rate.mean <= 0.1 and chance.spl.mean <= 0.1


def test_the_demonstrated_actions_succeed_and_show_the_demonstrated_frames() -> None:
    walk = draw_walk(seed=5, index=0, level="memory")
    walked = RoomEpisode(walk, image_size=SIZE, max_steps=40)
    for decision in walk.decisions:
        assert not walked.is_over and walked.view().shape == (48, 64, 3)
        assert walked.shortest_action() == decision.action
        walked.step(decision.action)
    outcome = walked.outcome()
    assert (outcome.is_success, outcome.spl, outcome.steps) == (True, 1.0, outcome.shortest_steps)
    with pytest.raises(ValueError, match="over"):
        walked.step("TURN_LEFT")


def test_only_a_stop_at_the_goal_is_a_success() -> None:
    def walk(*, leaves_out_stop: bool) -> Outcome:
        going = episode(3)
        while (action := going.shortest_action()) != "STOP":
            going.step(action)
        for action in ["TURN_LEFT"] * 4 if leaves_out_stop else ["STOP"]:
            going.step(action)
        return going.outcome()

    assert walk(leaves_out_stop=False).is_success
    left = walk(leaves_out_stop=True)
    assert (left.is_success, left.was_there, left.spl) == (False, True, 0.0)
    early = episode(3)
    early.step("STOP")
    assert (early.outcome().is_success, early.outcome().was_there, early.is_over) == (False, False, True)


def test_a_wall_is_not_walked_through_and_no_walk_is_longer_than_allowed() -> None:
    going = episode(1, max_steps=30)
    while not going.is_over:
        going.step("MOVE_FORWARD")
    outcome = going.outcome()
    assert (outcome.steps, outcome.has_stopped) == (30, False)
    assert outcome.path_m < 4.3, "a room is at most 4.2 m long"
    with pytest.raises(ValueError, match="no action 'JUMP'"):
        episode(0).step("JUMP")


def test_intervals_are_those_of_the_textbook() -> None:
    rate = measure_rate([True] * 8 + [False] * 2)
    assert (rate.mean, rate.low, rate.high) == (0.8, pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert measure_rate([False] * 10).low == 0 and measure_rate([True] * 10).high == pytest.approx(1)
    mean = measure_mean([1.0, 2.0, 3.0, 4.0])
    half = 1.959964 * math.sqrt(5 / 3 / 4)
    assert (mean.mean, mean.low, mean.high) == (2.5, pytest.approx(2.5 - half), pytest.approx(2.5 + half))
    assert measure_mean([1.0]).low is None
    with pytest.raises(ValueError, match="no episode"):
        score_navigation([])
