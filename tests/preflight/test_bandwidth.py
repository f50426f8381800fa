"""Rates of devices and nodes at, above and below every limit; counters that rose."""

from __future__ import annotations

from typing import Any

import pytest

from janus_cluster.job.profiles import load_preflight_profile
from janus_cluster.preflight.bandwidth import (
    counter_deltas,
    judge_counters,
    judge_gemm,
    judge_intra_node,
)
from janus_cluster.preflight.rate import Limit, judge_rate

H800 = load_preflight_profile("h800-ib")
GIB = 1 << 30


def test_counters_that_rose_during_the_probe_are_reported() -> None:
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


def test_a_rate_without_any_limit_is_never_a_pass() -> None:
    given: dict[str, str] = {"id": "x", "node": "n1", "unit": "GB/s", "detail": "", "fix": "f"}
    assert judge_rate(1.0, [], **given).state == "ERROR"
    limits = [Limit(2.0, "WARN", "w"), Limit(1.0, "FAIL", "f")]
    assert [judge_rate(v, limits, **given).state for v in (2.0, 1.5, 1.0, 0.9)] == ["PASS", "WARN", "WARN", "FAIL"]
    assert judge_rate(0.9, limits, **given).threshold_source == "f"
