"""Rates at, above and below every limit; a slow rail is named, and blamed on a node only where there is evidence."""

from __future__ import annotations

from typing import Any

import pytest

from janus_cluster.preflight.bandwidth import (
    attribute,
    counter_deltas,
    judge_counters,
    judge_gemm,
    judge_intra_node,
    judge_rails,
)
from janus_cluster.preflight.model import CheckResult
from janus_cluster.preflight.profile import load_profile
from janus_cluster.preflight.rate import Limit, judge_rate
from janus_cluster.resources import templates_dir

H800 = load_profile(templates_dir(), "h800-ib")
CPU = load_profile(templates_dir(), "cpu")
ETHERNET = load_profile(templates_dir(), "h800-ethernet")
NODES = ("n1", "n2")
GIB = 1 << 30


def rail(name: str, gb_per_s: float, *, again: float | None = None, together: float | None = None) -> dict[str, Any]:
    return {
        "name": name,
        "payload_bytes": GIB,
        "times_s": [GIB / gb_per_s / 1e9] * 3,
        "again_s": [GIB / again / 1e9] * 3 if again else None,
        "together_s": [GIB / (together or gb_per_s) / 1e9] * 3,
        "sum_correct": True,
        "error": None,
    }


def judged(rails: list[dict[str, Any]], profile: dict[str, Any] = H800, **more: Any) -> dict[str, CheckResult]:
    results = judge_rails(rails, profile, nodes=NODES, **({"deltas": {}, "evidence": "loopback 3"} | more))
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
    dead = rail("ib0", 1.0) | {"times_s": [], "together_s": [], "error": "n2: timed out"}
    wrong = rail("ib1", 1.0) | {"sum_correct": False}
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
        "which end is slow cannot be told: error counters n1 +0, n2 +0; loopback 3",
    )
    loud: dict[str, dict[str, dict[str, int]]] = {"n1": {"ib3": {}}, "n2": {"ib3": {"rx_errors": 7}, "ib4": {}}}
    assert attribute("ib3", NODES, loud, "")[0] == "n2"
    assert attribute("ib4", NODES, loud, "")[0] == "n1,n2", "another rail's errors blame nobody for this one"
    assert attribute("gpu3", NODES, {"n1": {}, "n2": {"mlx5_3:1": {"symbol_error": 1}}}, "")[0] == "n2"
    dropping = {"n1": {"mlx5_3:1": {}, "ib0": {"tx_dropped": 9}}, "n2": {"mlx5_3:1": {}, "ib0": {}}}
    assert attribute("gpu3", NODES, dropping, "")[0] == "n1,n2", "what IPoIB drops blames nobody for a rail of GPUs"
    ethernet: dict[str, dict[str, dict[str, int]]] = {"n1": {"eth0": {"rx_errors": 9}}, "n2": {"eth0": {}}}
    assert attribute("gpu3", NODES, ethernet, "")[0] == "n1"
    both: dict[str, dict[str, dict[str, int]]] = {"n1": {"ib3": {"rx_errors": 1}}, "n2": {"ib3": {"rx_errors": 7}}}
    assert attribute("ib3", NODES, both, "")[0] == "n1,n2"
    slow = judged([rail("ib3", 0.5), rail("ib0", 1.0)], CPU, deltas=loud)["rail.ib3"]
    assert slow.node == "n2" and "counters rose at one end" in slow.fix


def test_counters_that_rose_during_the_probe_are_told() -> None:
    before = {"mlx5_0:1": {"symbol_error": 5, "port_rcv_errors": 1}, "gone": {"x": 1}}
    after = {"mlx5_0:1": {"symbol_error": 9, "port_rcv_errors": 0, "new": 3}, "mlx5_1:1": {"symbol_error": 2}}
    deltas = counter_deltas(before, after)
    assert deltas == {"mlx5_0:1": {"symbol_error": 4}}
    risen = judge_counters(deltas, node="n1", is_wanted=True)
    assert (risen.state, risen.measured) == ("WARN", "mlx5_0:1 symbol_error +4")
    assert judge_counters({"mlx5_0:1": {}}, node="n1", is_wanted=True).state == "PASS"
    assert judge_counters(None, node="n1", is_wanted=False).state == "ERROR"
    assert judge_counters({}, node="n1", is_wanted=True).state == "ERROR"
    assert judge_counters({}, node="n1", is_wanted=False).state == "SKIP"


def gemm(*tflops: float, consistent: bool = True) -> dict[str, Any]:
    return {"gemm": [{"rank": i, "local_rank": i, "tflops": t, "consistent": consistent} for i, t in enumerate(tflops)]}


@pytest.mark.parametrize(
    ("rates", "state"),
    [
        ([700.0] * 8, "PASS"),
        ([550.0] * 8, "PASS"),
        ([549.0] * 8, "WARN"),
        ([399.0] * 8, "FAIL"),
        ([700.0] * 7 + [561.0], "PASS"),
        ([700.0] * 7 + [559.0], "FAIL"),
    ],
)
def test_the_slowest_gpu_is_judged_against_the_floor_and_its_neighbours(rates: list[float], state: str) -> None:
    assert judge_gemm(gemm(*rates), H800, node="n1").state == state


def test_a_gpu_that_computes_the_same_differently_fails() -> None:
    assert judge_gemm(gemm(700.0, consistent=False), H800, node="n1").state == "FAIL"


@pytest.mark.parametrize(("busbw", "state"), [(160.0, "PASS"), (135.01, "PASS"), (134.9, "FAIL")])
def test_the_all_reduce_within_a_node_is_judged(busbw: float, state: str) -> None:
    part = {"times_s": [1.75 * GIB / busbw / 1e9], "payload_bytes": GIB, "num_ranks": 8, "sum_correct": True}
    assert judge_intra_node({"intra_node": part}, H800, node="n1").state == state
    assert judge_intra_node({"intra_node": part | {"sum_correct": False}}, H800, node="n1").state == "FAIL"
    assert judge_intra_node({"intra_node": None}, H800, node="n1").state == "SKIP"


@pytest.mark.parametrize(("rate", "state"), [(48.0, "PASS"), (47.9, "WARN"), (44.0, "WARN"), (39.9, "FAIL")])
def test_a_baseline_of_the_site_is_stricter_than_the_profile(rate: float, state: str) -> None:
    row = H800["baseline"] | {"measured": {"rail.gpu0": 53.3333, "other": 9e9}}
    profile = H800 | {"baseline": row, "rails": H800["rails"] | {"busbw_gb_per_s": {"fail_below": 1, "source": "s"}}}
    found = judged([rail("gpu0", rate)], profile)["rail.gpu0"]
    assert found.state == state
    assert state == "PASS" or "baseline of this site: 53.3" in found.threshold_source


def test_a_rate_without_any_limit_is_never_a_pass() -> None:
    given: dict[str, str] = {"id": "x", "node": "n1", "unit": "GB/s", "detail": "", "fix": "f"}
    assert judge_rate(1.0, [], **given).state == "ERROR"
    limits = [Limit(2.0, "WARN", "w"), Limit(1.0, "FAIL", "f")]
    assert [judge_rate(v, limits, **given).state for v in (2.0, 1.5, 1.0, 0.9)] == ["PASS", "WARN", "WARN", "FAIL"]
    assert judge_rate(0.9, limits, **given).threshold_source == "f"
