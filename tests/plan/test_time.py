"""Seconds of a step: limits where the answer is known, and the one logged run."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plan_jobs import node_gain, setup

from janus_cluster.modelspec.sizes import Sizes
from janus_cluster.plan.flops import count_flops
from janus_cluster.plan.hardware import ASSUMED, known_gpus
from janus_cluster.plan.sample import Sample
from janus_cluster.plan.time import LOGGED_STEP_S, plan_step, plan_traffic, predecessor_step

H800 = known_gpus()["h800"]
IDEAL = replace(ASSUMED, efficiency=1.0, hidden=1.0, straggler=0.0, module_call_s=0.0, optimizer_bytes=0.0)


def test_without_any_loss_a_step_takes_its_operations_at_the_peak(sizes: Sizes, sample: Sample) -> None:
    way = setup(deepspeed__profile="zero0", training__gradient_checkpointing=False)
    endless_bus = replace(H800, bus_one_node_gb_per_s=1e9, bus_two_nodes_gb_per_s=1e9)
    time = plan_step(sizes, sample, way, endless_bus, assumed=IDEAL)
    assert time.total == pytest.approx(8 * count_flops(sizes, sample, way.work).total / 989e12)
    assert time.total == pytest.approx(1.8, abs=0.05)  # the known 1.8 s per step of 64


def test_the_logged_run_is_reproduced_within_a_tenth() -> None:
    assert predecessor_step().total == pytest.approx(LOGGED_STEP_S, rel=0.1)
    assert predecessor_step().hooks > 0.7 * LOGGED_STEP_S


def test_payloads_of_each_stage(sizes: Sizes) -> None:
    trained, everything = 2 * (8_342_249_476 - 631_975_680), 2 * 8_342_249_476
    zero1, zero2, zero3 = (plan_traffic(sizes, setup(deepspeed__profile=f"zero{n}")) for n in (1, 2, 3))
    assert (zero1.reduce_step, zero1.gather_step, zero1.reduce) == (trained, trained, 0)
    assert (zero2.reduce, zero2.gather_step, zero2.reduce_passes) == (trained, trained, 2)
    # The frozen vision tower, all that is not trained, is not passed on the way back.
    assert (zero3.gather_forward, zero3.gather_backward, zero3.reduce) == (everything, trained, trained)
    learning = plan_traffic(sizes, setup(deepspeed__profile="zero3", training__tune={"vision": True}))
    assert (learning.gather_forward, learning.gather_backward) == (everything, everything)
    alone = plan_traffic(sizes, replace(setup(), ranks_per_node=1))
    assert alone.reduce + alone.gather_forward + alone.gather_step == 0


def test_bytes_over_the_bus_take_as_long_as_the_bandwidth_gives(sizes: Sizes, sample: Sample) -> None:
    way = setup(deepspeed__profile="zero1")
    time = plan_step(sizes, sample, way, H800, assumed=replace(ASSUMED, hidden=0.0))
    trained = 2 * (8_342_249_476 - 631_975_680)
    # an all-reduce passes the bus twice, the gathering of new weights once, each for 7 of 8 parts
    assert time.communication == pytest.approx(3 * trained * 7 / 8 / 135e9)
    assert time.exposed == pytest.approx(time.communication)


def test_nothing_hides_longer_than_what_it_hides_behind(sizes: Sizes, sample: Sample) -> None:
    slow = replace(H800, bus_one_node_gb_per_s=1.0, bus_two_nodes_gb_per_s=1.0)
    time = plan_step(sizes, sample, setup(deepspeed__profile="zero3"), slow)
    assert 0.9 * time.communication < time.exposed < time.communication
    no_overlap = setup(deepspeed__profile="zero2", deepspeed__overrides={"zero_optimization.overlap_comm": False})
    time = plan_step(sizes, sample, no_overlap, H800)
    assert time.exposed == pytest.approx(time.communication)


def test_two_nodes_bring_nearly_twice_and_never_more(sizes: Sizes, sample: Sample) -> None:
    for profile in ("zero1", "zero2", "zero3"):
        way = setup(deepspeed__profile=profile)
        same, larger = (node_gain(sizes, sample, way, H800, same_batch=s) for s in (True, False))
        assert 1.7 < same <= larger + 0.05, profile
        assert larger < 2, profile
    tenth = replace(H800, bus_two_nodes_gb_per_s=13.0)
    assert node_gain(sizes, sample, setup(deepspeed__profile="zero2"), tenth, same_batch=True) < 1.2


def test_with_the_same_batch_each_rank_of_two_nodes_does_half_the_micro_steps(sizes: Sizes, sample: Sample) -> None:
    one, two = (
        plan_step(
            sizes,
            sample,
            setup(deepspeed__profile="zero1", nodes=nodes, training__gradient_accumulation_steps=8 // nodes),
            H800,
        ).total
        for nodes in (1, 2)
    )
    gain = node_gain(sizes, sample, setup(deepspeed__profile="zero1"), H800, same_batch=True)
    assert gain == pytest.approx(one / two)


def test_offloading_and_hooks_cost_time(sizes: Sizes, sample: Sample) -> None:
    zero2, offload, zero3 = (
        plan_step(sizes, sample, setup(deepspeed__profile=p), H800) for p in ("zero2", "zero2_offload", "zero3")
    )
    assert offload.optimizer > 100 * zero2.optimizer
    assert zero2.hooks == 0 < zero3.hooks
    two_nodes = plan_step(sizes, sample, setup(deepspeed__profile="zero2_offload", nodes=2), H800)
    assert two_nodes.optimizer == pytest.approx(offload.optimizer / 2)
