"""A slow rail is named, and blamed on the node whose end it is as soon as a sound partner shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from janus_cluster.job.profiles import load_preflight_profile
from janus_cluster.preflight.rails import attribute, judge_rails
from janus_cluster.run.records.rails import Pair, RailTest
from janus_cluster.run.records.verdict import CheckResult, Verdict

H800 = load_preflight_profile("h800-ib")
CPU = load_preflight_profile("cpu")
ETHERNET = load_preflight_profile("h800-ethernet")
NODES = ("n1", "n2")
FOUR = ("n1", "n2", "n3", "n4")
GIB = 1 << 30


def rail(
    name: str, gb_per_s: float, *, again: float | None = None, together: float | None = None, nodes: Pair = NODES
) -> list[RailTest]:
    """The tests of a pair on one rail: alone, once more, and with all rails at once."""
    every = [(False, gb_per_s), *([(False, again)] if again else []), (True, together or gb_per_s)]
    return [
        RailTest(rail=name, nodes=nodes, together=at_once, payload_bytes=GIB, times_s=(GIB / rate / 1e9,) * 3)
        for at_once, rate in every
    ]


def judged(
    rails: list[list[RailTest]], profile: dict[str, Any] = H800, *, nodes: Sequence[str] = NODES, **more: Any
) -> dict[str, CheckResult]:
    tests = [test for tests in rails for test in tests]
    results = judge_rails(tests, profile, nodes=nodes, **({"deltas": {}, "evidence": "loopback 3"} | more))
    return {r.id: r for r in results}


@pytest.mark.parametrize(
    ("rate", "state"),
    [(48.9, "PASS"), (46.001, "PASS"), (45.9, "WARN"), (43.001, "WARN"), (42.9, "FAIL"), (24.0, "FAIL")],
)
def test_a_rail_is_judged_against_the_published_floor(rate: float, state: str) -> None:
    found = judged([rail("gpu0", rate)])
    assert (found["rail.gpu0"].state, found["rails_together.gpu0"].state) == (state, state)
    assert ("43" if state == "FAIL" else "46") in found["rail.gpu0"].expected


@pytest.mark.parametrize(("rate", "state"), [(0.59, "FAIL"), (0.6001, "PASS"), (1.0, "PASS"), (5.0, "PASS")])
def test_a_rail_is_judged_against_the_other_rails_where_line_rate_is_not_known(rate: float, state: str) -> None:
    found = judged([*(rail(f"ib{i}", 1.0) for i in range(7)), rail("ib7", rate)], CPU)
    assert {found[f"rail.ib{i}"].state for i in range(7)} == {"PASS"}
    assert found["rail.ib7"].state == state
    assert "median of the other rails (1)" in found["rail.ib7"].threshold_source


@pytest.mark.parametrize(("rate", "state"), [(2.9, "PASS"), (1.5001, "PASS"), (1.19, "FAIL")])
def test_eight_pairs_over_one_25_gb_link_are_sound_and_over_a_link_that_fell_back_to_10_are_not(
    rate: float, state: str
) -> None:
    found = judged([rail(f"gpu{k}", rate, together=rate / 8) for k in range(8)], ETHERNET)
    assert {r.state for r in found.values()} == {state}


def test_half_of_two_rails_is_found() -> None:
    found = judged([rail("ib0", 1.0), rail("ib1", 0.5)], CPU)
    assert (found["rail.ib0"].state, found["rail.ib1"].state) == ("PASS", "FAIL")


def test_a_rail_that_was_slow_once_passes_and_one_that_was_slow_again_fails() -> None:
    assert judged([rail("gpu0", 24.0, again=48.0)])["rail.gpu0"].state == "PASS"
    twice = judged([rail("gpu0", 24.0, again=25.0)])["rail.gpu0"]
    assert twice.state == "FAIL"
    assert "repeated" in twice.measured and "25 GB/s" in twice.measured


def test_a_rail_that_is_slow_only_under_the_load_of_all_is_found() -> None:
    found = judged([rail("gpu0", 48.0), rail("gpu1", 48.0, together=24.0)])
    assert [i for i, r in found.items() if r.state == "FAIL"] == ["rails_together.gpu1"]


def test_a_rail_that_carries_nothing_or_wrong_data_fails() -> None:
    dead = [replace(rail("ib0", 1.0)[0], times_s=(), error="n2: timed out")]
    wrong = [replace(rail("ib1", 1.0)[0], sum_correct=False)]
    found = judged([dead, wrong, rail("ib2", 1.0)], CPU)
    assert (found["rail.ib0"].state, found["rail.ib0"].measured) == ("FAIL", "n2: timed out")
    assert (found["rail.ib1"].state, found["rail.ib1"].measured) == ("FAIL", "the sum was wrong")
    assert found["rail.ib2"].state == "PASS"


def test_no_rail_is_a_skip_with_its_reason() -> None:
    assert [r.state for r in judge_rails([], CPU, nodes=["n1"], deltas={}, evidence="")] == ["SKIP"]
    two = judge_rails([], CPU, nodes=NODES, deltas={}, evidence="")
    assert (two[0].state, "share no network" in two[0].measured) == ("SKIP", True)


def test_a_slow_rail_is_of_the_pair_unless_the_counters_rose_at_one_end() -> None:
    quiet: dict[str, dict[str, dict[str, int]]] = {"n1": {"ib3": {"rx_errors": 0}}, "n2": {"ib3": {}}}
    assert attribute("ib3", NODES, quiet, "loopback 3") == (
        "n1,n2",
        "which end is slow cannot be determined: error counters n1 +0, n2 +0; loopback 3",
    )
    loud: dict[str, dict[str, dict[str, int]]] = {"n1": {"ib3": {}}, "n2": {"ib3": {"rx_errors": 7}, "ib4": {}}}
    assert attribute("ib3", NODES, loud, "")[0] == "n2"
    assert attribute("ib4", NODES, loud, "")[0] == "n1,n2", "another rail's errors blame no node for this one"
    assert attribute("gpu3", NODES, {"n1": {}, "n2": {"mlx5_3:1": {"symbol_error": 1}}}, "")[0] == "n2"
    dropping = {"n1": {"mlx5_3:1": {}, "ib0": {"tx_dropped": 9}}, "n2": {"mlx5_3:1": {}, "ib0": {}}}
    assert attribute("gpu3", NODES, dropping, "")[0] == "n1,n2", "what IPoIB drops blames no node for a rail of GPUs"
    ethernet: dict[str, dict[str, dict[str, int]]] = {"n1": {"eth0": {"rx_errors": 9}}, "n2": {"eth0": {}}}
    assert attribute("gpu3", NODES, ethernet, "")[0] == "n1"
    both: dict[str, dict[str, dict[str, int]]] = {"n1": {"ib3": {"rx_errors": 1}}, "n2": {"ib3": {"rx_errors": 7}}}
    assert attribute("ib3", NODES, both, "")[0] == "n1,n2"
    slow = judged([rail("ib3", 0.5), rail("ib0", 1.0)], CPU, deltas=loud)["rail.ib3"]
    assert slow.node == "n2" and "counters rose at one end" in slow.fix


@pytest.mark.parametrize(("rate", "state"), [(48.0, "PASS"), (47.9, "WARN"), (44.0, "WARN"), (39.9, "FAIL")])
def test_a_baseline_of_the_site_is_stricter_than_the_profile(rate: float, state: str) -> None:
    row = H800["baseline"] | {"measured": {"rail.gpu0": 53.3333, "other": 9e9}}
    profile = H800 | {"baseline": row, "rails": H800["rails"] | {"busbw_gb_per_s": {"fail_below": 1, "source": "s"}}}
    found = judged([rail("gpu0", rate)], profile)["rail.gpu0"]
    assert found.state == state
    assert state == "PASS" or "baseline of this site: 53.3" in found.threshold_source


def of_four(slow: dict[Pair, float], *, rails: int = 8, bad: str = "ib3", sound: float = 48.0) -> list[list[RailTest]]:
    """Two rounds of disjoint pairs on four nodes; `slow`: the rates of pairs on rail `bad`."""
    pairs: list[Pair] = [("n1", "n3"), ("n2", "n4"), *(p for p in slow if p not in (("n1", "n3"), ("n2", "n4")))]
    names = [f"ib{k}" for k in range(rails)]
    return [rail(n, slow.get(p, sound) if n == bad else sound, nodes=p) for p in pairs for n in names]


def rows(rails: list[list[RailTest]], profile: dict[str, Any] = H800, nodes: Sequence[str] = FOUR) -> list[CheckResult]:
    tests = [test for tests in rails for test in tests]
    return judge_rails(tests, profile, nodes=nodes, deltas={}, evidence="loopback 3")


def failed(results: list[CheckResult]) -> list[tuple[str, str]]:
    return [(r.id, r.node) for r in results if r.state == "FAIL"]


def exclusion(results: list[CheckResult], nodes: Sequence[str] = FOUR) -> tuple[str, ...]:
    verdict = Verdict(
        state="FAIL", job_id="1", config_hash="x", nodes=tuple(nodes), created_at=0.0, results=tuple(results)
    )
    return verdict.exclude


@pytest.mark.parametrize("profile", [H800, CPU])
def test_of_four_nodes_a_half_rate_rail_is_of_the_node_that_is_slow_with_a_sound_one(profile: dict[str, Any]) -> None:
    found = rows(of_four({("n1", "n3"): 24.0, ("n1", "n2"): 48.0, ("n3", "n4"): 24.0}), profile)
    assert failed(found) == [("rail.ib3", "n3")] + ([("rails_together.ib3", "n3")] if profile is H800 else [])
    assert exclusion(found) == ("n3",)
    bad = found[[r.id for r in found].index("rail.ib3")]
    assert bad.measured.startswith("24 GB/s") and "slow with n1, n4, with whom others are fast" in bad.fix
    assert {(r.id, r.node) for r in found if r.id == "rail.ib3" and r.state == "PASS"} == {("rail.ib3", "n1,n2,n4")}


def test_of_four_sound_nodes_each_rail_is_one_row_with_its_slowest_pair() -> None:
    found = rows(of_four({("n2", "n4"): 46.5}))
    assert {r.state for r in found} == {"PASS"} and len(found) == 16
    slowest = next(r for r in found if r.id == "rail.ib3")
    assert slowest.node == ",".join(FOUR)
    assert slowest.measured.startswith("46.5 GB/s (slowest of 2 pairs") and "n2 and n4" in slowest.measured


def test_where_no_pair_is_fast_no_node_is_blamed() -> None:
    every = dict.fromkeys((("n1", "n3"), ("n2", "n4"), ("n1", "n2"), ("n3", "n4"), ("n1", "n4"), ("n2", "n3")), 24.0)
    found = rows(of_four(every))
    assert {node for id, node in failed(found) if id == "rail.ib3"} == {
        "n1,n3",
        "n2,n4",
        "n1,n2",
        "n3,n4",
        "n1,n4",
        "n2,n3",
    }
    assert exclusion(found) == ()


def test_a_node_that_was_slow_once_and_then_fast_is_sound() -> None:
    found = rows(of_four({("n1", "n3"): 24.0, ("n1", "n2"): 48.0, ("n3", "n4"): 48.0}))
    assert failed(found) == []


def test_a_node_that_only_a_bad_one_tested_has_not_passed() -> None:
    found = rows(of_four({("n1", "n3"): 24.0, ("n3", "n4"): 24.0}))
    assert failed(found)[0] == ("rail.ib3", "n3")
    assert [(r.state, r.measured) for r in found if r.id == "rail.ib3" and r.node == "n1"] == [("ERROR", "not tested")]
    missing = rows(of_four({}), nodes=(*FOUR, "n5"))
    assert {(r.id, r.state) for r in missing if r.node == "n5"} == {(f"rail.ib{k}", "ERROR") for k in range(8)}


def test_a_rail_that_carries_nothing_is_of_the_node_whose_partners_are_sound() -> None:
    tests = [test for tests in of_four({("n1", "n3"): 24.0, ("n1", "n2"): 48.0, ("n3", "n4"): 24.0}) for test in tests]
    dead = [
        replace(t, times_s=(), error="n3: timed out") if t.rail == "ib3" and "n3" in t.nodes else t
        for t in tests
        if not t.together
    ]
    found = judge_rails(dead, CPU, nodes=FOUR, deltas={}, evidence="")
    assert [(r.id, r.node, r.measured) for r in found if r.state == "FAIL"] == [("rail.ib3", "n3", "n3: timed out")]


def test_a_node_whose_rails_are_all_slow_is_found_among_four_and_not_among_two() -> None:
    """Its own rails agree with each other; those of the others do not."""
    tests = [rail(f"ib{k}", 0.5 if "n3" in p else 1.0, nodes=p) for k in range(8) for p in _pairs_of("n3")]
    assert exclusion(rows(tests, CPU)) == ("n3",)
    assert failed(rows([rail(f"ib{k}", 0.5) for k in range(8)], CPU, nodes=NODES)) == []


def _pairs_of(bad: str) -> list[Pair]:
    return [("n1", "n3"), ("n2", "n4"), ("n1", "n2"), (bad, "n4")]
