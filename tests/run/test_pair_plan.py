"""Which pairs of nodes are tested on a rail, in how many rounds, and what they show of every end."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

import pytest

from janus_cluster.run.records.rails import Ends, Pair, PairPlan, RailTest, attribute_ends, best_rates, median_of_others


def names(number: int) -> list[str]:
    return [f"n{k}" for k in range(number)]


def play(nodes: Sequence[str], bad: Collection[str], *, repeats: int = 1, is_broken: bool = False) -> tuple[int, Ends]:
    """(number of rounds, the result) where exactly the pairs with a bad end are slow."""
    plan, slow, fast, rounds = PairPlan(nodes, repeats=repeats), list[Pair](), list[Pair](), 0
    while pairs := plan.next_round():
        rounds += 1
        busy = [node for pair in pairs for node in pair]
        assert len(busy) == len(set(busy)), "no node is in two pairs of a round"
        for pair in pairs:
            is_slow = bool(set(pair) & set(bad))
            (slow if is_slow else fast).append(pair)
            plan.note(pair, is_slow=is_slow, is_broken=is_slow and is_broken)
    return rounds, attribute_ends(slow, fast)


@pytest.mark.parametrize("number", [3, 4, 5, 6, 7, 8, 9, 16, 33, 64])
@pytest.mark.parametrize("is_broken", [False, True])
def test_of_three_or_more_nodes_one_bad_end_is_attributed_whichever_it_is(number: int, is_broken: bool) -> None:
    for bad in names(number):
        _, ends = play(names(number), {bad}, is_broken=is_broken)
        assert (ends.bad, ends.undecided) == ({bad}, ())
        assert ends.sound == set(names(number)) - {bad}


@pytest.mark.parametrize("number", [5, 8, 16])
def test_two_bad_ends_are_attributed_to_both(number: int) -> None:
    for bad in itertools.combinations(names(number), 2):
        assert play(names(number), bad)[1].bad == set(bad)


def test_two_nodes_are_one_pair_and_neither_is_blamed() -> None:
    assert play(names(2), ()) == (1, Ends(frozenset(names(2)), frozenset(), ()))
    rounds, ends = play(names(2), {"n0"}, repeats=3)
    assert (rounds, ends) == (4, Ends(frozenset(), frozenset(), (("n0", "n1"),)))
    assert play(names(2), {"n0"}, repeats=3, is_broken=True)[0] == 1, "what carries nothing is not waited for again"


@pytest.mark.parametrize(("number", "rounds"), [(2, 1), (3, 3), (4, 1), (5, 2), (8, 1), (9, 2), (64, 1)])
def test_sound_nodes_need_as_many_rounds_however_many_they_are(number: int, rounds: int) -> None:
    assert play(names(number), ())[0] == rounds


@pytest.mark.parametrize("number", [4, 8, 16, 32, 64])
def test_rounds_grow_with_the_logarithm_of_the_nodes_whatever_is_bad(number: int) -> None:
    logarithm = (number - 1).bit_length()
    for share in (1, 2, number // 2, number - 2, number - 1, number):
        rounds, _ = play(names(number), set(names(number)[:share]), repeats=1)
        assert rounds <= 2 + logarithm


def test_a_node_that_was_slow_is_tested_as_often_as_the_profile_demands() -> None:
    plan = PairPlan(names(4), repeats=6)
    counts = 0
    while pairs := plan.next_round():
        for pair in pairs:
            counts += "n1" in pair
            plan.note(pair, is_slow="n1" in pair)
    assert counts == 7


def test_a_suspect_meets_another_partner_each_time() -> None:
    plan, partners = PairPlan(names(8), repeats=3), []
    while pairs := plan.next_round():
        for pair in pairs:
            plan.note(pair, is_slow="n1" in pair)
            partners += [node for node in pair if "n1" in pair and node != "n1"]
    assert len(set(partners)) == len(partners) == 4


def test_noise_that_is_gone_the_next_time_blames_no_node() -> None:
    plan = PairPlan(names(4), repeats=1)
    first = plan.next_round()
    for pair in first:
        plan.note(pair, is_slow=pair == first[0])
    second = plan.next_round()
    assert {node for pair in second for node in pair} >= set(first[0])
    for pair in second:
        plan.note(pair, is_slow=False)
    assert plan.next_round() == []


def test_rates_are_of_ends_and_a_test_is_compared_with_those_that_took_no_part_in_it() -> None:
    def test_of(rail: str, pair: Pair, rate: float) -> RailTest:
        return RailTest(rail=rail, nodes=pair, together=False, payload_bytes=10**9, times_s=(1 / rate, 2 / rate))

    slow = test_of("ib1", ("a", "b"), 1.0)
    tests = [test_of("ib0", ("a", "b"), 2.0), slow, test_of("ib1", ("a", "c"), 4.0)]
    best = best_rates(tests, statistic="best")
    assert best == {("a", "ib0"): 2.0, ("b", "ib0"): 2.0, ("a", "ib1"): 4.0, ("b", "ib1"): 1.0, ("c", "ib1"): 4.0}
    assert median_of_others(slow, best) == 2.0
    assert best_rates([slow], statistic="median")["a", "ib1"] == pytest.approx(2 / 3)
    assert median_of_others(slow, best_rates([slow], statistic="best")) is None
