"""Scores of small tables worked out by hand."""

from __future__ import annotations

import math

import pytest

from janus_cluster.janusvln.scores import (
    count_confusion,
    parse_action_line,
    parse_action_word,
    perplexities,
    score_actions,
    score_majority,
)

STOP, FORWARD, LEFT, RIGHT = range(4)
ANSWER = "SUBINSTRUCTION: go\n2D_DESCRIPTION: a door\n3D_DESCRIPTION: near\nACTION: {}"


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (ANSWER.format("STOP"), STOP),
        (ANSWER.format("TURN_RIGHT \n"), RIGHT),
        ("ACTION:MOVE_FORWARD", FORWARD),
        (ANSWER.format("turn_left"), None),
        (ANSWER.format("STOP."), None),
        (ANSWER.format("STOP MOVE_FORWARD"), None),
        (ANSWER.format("STOP\nACTION: STOP"), None),
        (ANSWER.format(""), None),
        ("SUBINSTRUCTION: the ACTION: STOP", None),
        ("STOP", None),
        ("", None),
    ],
)
def test_only_one_whole_action_line_is_an_action(text: str, label: int | None) -> None:
    assert parse_action_line(text) == label


def test_an_answer_without_parts_is_the_action_and_nothing_else() -> None:
    assert parse_action_word("TURN_LEFT\n") == LEFT
    assert parse_action_word("ACTION: TURN_LEFT") is None
    assert parse_action_word("TURN_LEFT TURN_LEFT") is None


def test_scores_of_a_table_worked_out_by_hand() -> None:
    truth = [FORWARD, FORWARD, FORWARD, LEFT, LEFT, STOP, -100]
    predicted = [FORWARD, FORWARD, LEFT, LEFT, FORWARD, None, RIGHT]
    confusion = count_confusion(truth, predicted)
    assert confusion == [[0, 0, 0, 0, 1], [0, 2, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]
    scores = score_actions(confusion)
    assert (scores.num_samples, scores.num_unparsable) == (6, 1)
    assert scores.accuracy == pytest.approx(3 / 6)
    forward, left, stop, right = (
        scores.by_action[name] for name in ("MOVE_FORWARD", "TURN_LEFT", "STOP", "TURN_RIGHT")
    )
    assert (forward.precision, forward.recall, forward.f1) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert (left.precision, left.recall, left.f1) == pytest.approx((1 / 2, 1 / 2, 1 / 2))
    assert (stop.precision, stop.recall, stop.f1, stop.support) == (None, 0.0, 0.0, 1)
    assert (right.precision, right.recall, right.f1, right.support) == (None, None, None, 0)
    assert scores.macro_f1 == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_an_action_that_was_only_predicted_counts_in_the_macro_f1() -> None:
    scores = score_actions(count_confusion([STOP, STOP], [STOP, RIGHT]))
    assert scores.macro_f1 == pytest.approx((2 / 3 + 0) / 2)


def test_the_majority_is_the_most_frequent_true_action() -> None:
    majority = score_majority(count_confusion([LEFT, LEFT, FORWARD], [STOP, STOP, STOP]))
    assert (majority.action, majority.accuracy) == ("TURN_LEFT", pytest.approx(2 / 3))


def test_nothing_to_score_gives_no_number() -> None:
    scores = score_actions(count_confusion([], []))
    assert (scores.num_samples, scores.accuracy, scores.macro_f1) == (0, None, None)
    assert score_majority(scores.confusion).accuracy is None


def test_perplexity_is_the_exponential_of_the_mean_and_none_without_one() -> None:
    found = perplexities(("a", "b", "c"), [4 * math.log(3), 0.0, 5000.0], [4, 0, 1])
    assert found == {"a": pytest.approx(3.0), "b": None, "c": None}
