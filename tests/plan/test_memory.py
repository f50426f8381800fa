"""Bytes on a GPU: what each stage cuts, and how memory moves with batch, nodes, sample and recomputing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plan_jobs import setup

from janus_cluster.job.schema import Data, Lora, Tune
from janus_cluster.modelspec.sizes import Sizes
from janus_cluster.plan.flops import Work
from janus_cluster.plan.memory import (
    GB,
    activation_bytes,
    layer_bytes_per_token,
    plan_memory,
    state_bytes,
    touched_elements,
)
from janus_cluster.plan.sample import Sample, plan_sample

TRAINED = 8_342_249_476 - 631_975_680
ALL = 8_342_249_476


@pytest.mark.parametrize(
    ("profile", "weights", "gradients", "optimizer"),
    [
        ("zero0", 2 * ALL, 2 * TRAINED, 12 * TRAINED),
        ("zero1", 2 * ALL, 2 * TRAINED, 12 * TRAINED / 8),
        ("zero2", 2 * ALL, 2 * TRAINED / 8, 12 * TRAINED / 8),
        ("zero3", 2 * ALL / 8, 2 * TRAINED / 8, 12 * TRAINED / 8),
    ],
)
def test_each_stage_cuts_one_thing_more(
    sizes: Sizes, profile: str, weights: float, gradients: float, optimizer: float
) -> None:
    held = state_bytes(sizes, setup(deepspeed__profile=profile))
    # ZeRO-3 keeps norms and biases whole: a megabyte.
    assert held == pytest.approx((weights, gradients, optimizer), rel=1e-3)


def test_the_known_states_of_7b_under_zero_2(sizes: Sizes, sample: Sample) -> None:
    memory = plan_memory(sizes, sample, setup(deepspeed__profile="zero2", training__gradient_accumulation_steps=1))
    # and 0.23 GB of gradients that a part of a tensor keeps whole
    assert memory.states / GB == pytest.approx(32.2, abs=0.2)
    assert layer_bytes_per_token(sizes, 2) == pytest.approx(221e3, rel=0.03)
    assert memory.vggt == 2 * sizes.vggt_parameters


def test_memory_falls_from_stage_to_stage_and_with_more_nodes(sizes: Sizes, sample: Sample) -> None:
    for nodes in (1, 2):
        states = [
            plan_memory(sizes, sample, setup(deepspeed__profile=profile, nodes=nodes)).states
            for profile in ("zero0", "zero1", "zero2", "zero3")
        ]
        assert states == sorted(states, reverse=True)
        assert len(set(states)) == 4
    for profile in ("zero1", "zero2", "zero3"):
        one, two = (
            plan_memory(sizes, sample, setup(deepspeed__profile=profile, nodes=nodes)).total for nodes in (1, 2)
        )
        assert two < one, profile


def test_offloading_moves_the_optimizer_to_the_host_and_nothing_is_lost(sizes: Sizes, sample: Sample) -> None:
    on_gpu = plan_memory(sizes, sample, setup(deepspeed__profile="zero2"))
    offloaded = plan_memory(sizes, sample, setup(deepspeed__profile="zero2_offload"))
    assert (offloaded.optimizer, offloaded.gradients, offloaded.step) == (0, 0, 0)
    assert offloaded.host_per_node == pytest.approx(16 * TRAINED)
    assert on_gpu.host_per_node == 0
    assert offloaded.total < on_gpu.total


def test_offload_param_does_something_under_stage_3_only(sizes: Sizes, sample: Sample) -> None:
    overrides = {"zero_optimization.offload_param.device": "cpu"}
    for profile, moves in (("zero2", False), ("zero3", True)):
        plain, offloaded = (
            plan_memory(sizes, sample, setup(deepspeed__profile=profile, deepspeed__overrides=o)).weights
            for o in ({}, overrides)
        )
        assert (offloaded < 0.01 * plain) == moves
        assert (offloaded == plain) != moves


def test_activations_grow_with_batch_and_tokens_and_shrink_with_recomputing(sizes: Sizes) -> None:
    def activations(history: int = 8, **keys: object) -> float:
        sample = plan_sample(Data(history=history))
        return plan_memory(sizes, sample, setup(deepspeed__profile="zero1", **keys)).activations

    none = activations(training__gradient_checkpointing=False)
    assert activations(training__gradient_checkpointing=False, training__per_device_batch_size=2) == 2 * none
    assert activations(4, training__gradient_checkpointing=False) < 0.65 * none
    by_every = [activations(training__gradient_checkpointing_every=every) for every in (1, 2, 4)]
    assert by_every == sorted(by_every)
    assert by_every[0] < 0.1 * none
    # 28 layers: seven of them keep their input only
    assert by_every[2] < none


def test_a_recomputed_layer_keeps_its_input_only(sizes: Sizes, sample: Sample) -> None:
    none, whole = (
        activation_bytes(sizes, sample, setup(training__gradient_checkpointing=again)) for again in (False, True)
    )
    assert none - whole == pytest.approx(3909 * 28 * (layer_bytes_per_token(sizes, 2) - 2 * 3584))


def test_gradients_that_are_held_beside_others_are_counted(sizes: Sizes, sample: Sample) -> None:
    def gradients(profile: str, steps: int) -> float:
        keys = {"deepspeed__profile": profile, "training__gradient_accumulation_steps": steps}
        return plan_memory(sizes, sample, setup(**keys)).gradients

    # ZeRO-2: the sum of earlier micro-steps beside the running one's. ZeRO-1: all of them, and the last one's copy.
    copy = gradients("zero2", 1)
    assert gradients("zero2", 8) == 2 * copy
    assert gradients("zero1", 8) == gradients("zero1", 1) + copy
    assert gradients("zero3", 8) == gradients("zero3", 1)


@pytest.mark.parametrize(("nodes", "held_gb"), [(1, 2.16), (2, 2.15)])
def test_a_rank_keeps_whole_gradients_of_tensors_that_its_part_cuts(
    sizes: Sizes, sample: Sample, nodes: int, held_gb: float
) -> None:
    keys = {"deepspeed__profile": "zero2", "training__gradient_accumulation_steps": 1}
    memory = plan_memory(sizes, sample, setup(nodes=nodes, **keys))
    # On 16 ranks the embedding, 1.09 GB, is more than a part, 0.96 GB: the second rank has all of it, and a part more.
    assert memory.gradients / GB == pytest.approx(held_gb, abs=0.01)


@pytest.mark.parametrize(
    ("groups", "ranks", "elements"),
    [
        ([[4, 4]], 2, 4),
        ([[6, 2]], 2, 8),
        ([[1, 6, 1]], 2, 7),
        ([[6, 2], [4, 4]], 2, 12),
        ([[10, 2]], 4, 12),
        ([[3]], 2, 3),
        ([[7]], 1, 7),
    ],
)
def test_touched_elements(groups: list[list[int]], ranks: int, elements: int) -> None:
    assert touched_elements(groups, ranks) == elements


def test_trained_groups_are_those_of_the_optimizer(sizes: Sizes) -> None:
    everything = sizes.trained_groups(Tune(), Lora())
    assert sum(map(sum, everything)) == TRAINED
    assert everything[0][0] == 152064 * 3584
    adapters = Lora(enabled=True)
    assert sum(map(sum, sizes.trained_groups(Tune(), adapters))) == sizes.trained_parameters(Tune(), adapters)
    assert sizes.trained_groups(Tune(llm=False, projector=False, vggt_merger=False, action_head=False), Lora()) == []


def test_activations_without_recomputing_are_the_known_ones(sizes: Sizes, sample: Sample) -> None:
    memory = plan_memory(sizes, sample, setup(deepspeed__profile="zero1", training__gradient_checkpointing=False))
    # 23 GB of kept layers, and less than a tenth of it for mergers and the backward pass's own temporaries
    assert 23e9 < memory.activations < 26e9


def test_logits_at_labels_are_a_twentieth_of_those_everywhere(sizes: Sizes, sample: Sample) -> None:
    labels = setup()
    everywhere = replace(labels, work=Work(head_on_all=True))
    few, all_of_them = (plan_memory(sizes, sample, s).logits for s in (labels, everywhere))
    assert few == 160 * 152064 * 16
    assert all_of_them / few == pytest.approx(3909 / 160)


def test_buckets_follow_the_profile_and_its_overrides(sizes: Sizes, sample: Sample) -> None:
    assert plan_memory(sizes, sample, setup(deepspeed__profile="zero2")).buckets == 3 * 2 * 5e8
    smaller = setup(deepspeed__profile="zero2", deepspeed__overrides={"zero_optimization.reduce_bucket_size": 10**8})
    assert plan_memory(sizes, sample, smaller).buckets == 3 * 2 * 1e8
    # ZeRO-3: one bucket and its copy, and a billion gathered weights
    assert plan_memory(sizes, sample, setup(deepspeed__profile="zero3")).buckets == 2 * 2 * 5e8 + 2 * 1e9


def test_what_is_held_at_once_is_added_and_what_is_not_is_not(sizes: Sizes, sample: Sample) -> None:
    memory = plan_memory(sizes, sample, setup(deepspeed__profile="zero2"))
    parts = memory.weights + memory.gradients + memory.optimizer + memory.vggt + memory.buckets
    assert memory.total == parts + max(memory.encoder, memory.activations + memory.logits, memory.step)
