"""An optimizer step's samples depend on the seed and the epoch alone; grouping only decides who computes what when."""

from __future__ import annotations

from collections import Counter
from itertools import chain, islice

import numpy as np
import pytest

from janus_cluster.janusvln.data.sampler import RankBatches, SampleOrder

LENGTHS = np.random.default_rng(0).integers(200, 4000, size=512)


def order(*roots: tuple[int, float], seed: int = 1, batch: int = 16) -> SampleOrder:
    """Roots as (number of samples, weight), their samples one after another."""
    return SampleOrder(
        root_of_sample=np.repeat(np.arange(len(roots)), [count for count, _ in roots]),
        root_weights=[weight for _, weight in roots],
        seed=seed,
        effective_batch_size=batch,
    )


def steps_on(world_size: int, rows: int, *, grouped: bool, epoch: int = 0) -> list[set[int]]:
    """The samples of each optimizer step, put together again from the micro-batches of all ranks."""
    shuffled = order((512, 1.0), batch=64)
    ranks = [
        RankBatches(shuffled, rank=rank, world_size=world_size, rows=rows, token_counts=LENGTHS if grouped else None)
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.set_epoch(epoch)
    micro_steps = [list(chain.from_iterable(batches)) for batches in zip(*ranks, strict=True)]
    per_step = 64 // (world_size * rows)
    return [set().union(*micro_steps[i : i + per_step]) for i in range(0, len(micro_steps), per_step)]


def test_an_epoch_draws_every_sample_once() -> None:
    for epoch in range(3):
        assert sorted(order((100, 2.0), (60, 2.0)).steps(epoch).ravel()) == list(range(160))


def test_epochs_and_seeds_differ_and_repeat_exactly() -> None:
    first = order((160, 1.0)).steps(0)
    assert np.array_equal(first, order((160, 1.0)).steps(0))
    assert not np.array_equal(first, order((160, 1.0)).steps(1))
    assert not np.array_equal(first, order((160, 1.0), seed=2).steps(0))
    assert first.ravel().tolist() != sorted(first.ravel())


def test_the_shuffle_is_the_same_on_every_machine_and_numpy() -> None:
    assert order((8, 1.0), batch=4).steps(0).tolist() == [[6, 3, 5, 2], [1, 7, 4, 0]]


def test_the_last_step_is_filled_up_with_the_first_draws_of_the_epoch() -> None:
    steps = order((70, 1.0)).steps(3)
    assert steps.shape == (5, 16)
    assert sorted(steps.ravel()[:70]) == list(range(70))
    assert steps.ravel()[70:].tolist() == steps.ravel()[:10].tolist()


def test_fewer_samples_than_a_step_are_repeated_to_fill_it() -> None:
    assert Counter(order((3, 1.0), batch=8).steps(0).ravel().tolist()).most_common()[-1][1] == 2


def test_a_root_of_twice_the_weight_is_drawn_twice_as_often_and_evenly() -> None:
    weighted = order((90, 1.0), (30, 2.0), batch=10)
    drawn = np.concatenate([weighted.steps(epoch).ravel() for epoch in range(50)])
    counts = np.bincount(drawn, minlength=120)
    assert counts[90:].mean() == pytest.approx(2 * counts[:90].mean(), rel=0.01)
    assert np.ptp(counts[:90]) <= 1 and np.ptp(counts[90:]) <= 1, "no sample of a root is preferred"
    assert weighted.steps_per_epoch == 12


def test_a_root_of_tiny_weight_is_still_seen_in_every_epoch() -> None:
    rare = order((1000, 1.0), (10, 0.001), batch=10)
    assert all((rare.steps(epoch) >= 1000).any() for epoch in range(4))


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        order((0, 1.0))


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("epoch", [0, 2])
def test_a_step_holds_the_same_samples_for_every_world_size(grouped: bool, epoch: int) -> None:
    alone = steps_on(1, 64, grouped=False, epoch=epoch)
    assert [len(step) for step in alone] == [64] * 8
    for world_size, rows in [(1, 4), (2, 1), (8, 1), (16, 4), (16, 1)]:
        assert steps_on(world_size, rows, grouped=grouped, epoch=epoch) == alone


def test_ranks_and_rows_that_do_not_divide_the_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="64 samples a step do not divide into 3 ranks × 1 rows"):
        RankBatches(order((64, 1.0), batch=64), rank=0, world_size=3, rows=1)


def padding_share(of_ranks: list[list[list[int]]]) -> float:
    batches = list(chain.from_iterable(of_ranks))
    slots = sum(len(batch) * LENGTHS[batch].max() for batch in batches)
    return 1 - sum(LENGTHS[batch].sum() for batch in batches) / slots


def test_grouping_lowers_padding_and_evens_out_the_ranks() -> None:
    shuffled = order((512, 1.0), batch=64)

    def batches(token_counts: np.ndarray | None, rows: int) -> list[list[list[int]]]:
        return [
            list(RankBatches(shuffled, rank=rank, world_size=4, rows=rows, token_counts=token_counts))
            for rank in range(4)
        ]

    plain, grouped = batches(None, 4), batches(LENGTHS, 4)
    assert padding_share(plain) > 0.3
    assert padding_share(grouped) < 0.1
    tokens = [np.array([[LENGTHS[b].sum() for b in rank] for rank in batches(counts, 1)]) for counts in (None, LENGTHS)]
    waiting = [float((t.max(0) - t).sum() / t.sum()) for t in tokens]
    assert waiting[1] < 0.25 * waiting[0], "ranks wait less for the one with the longest sample"


def test_the_longest_micro_batch_of_a_step_comes_first() -> None:
    batches = list(RankBatches(order((512, 1.0), batch=64), rank=0, world_size=2, rows=4, token_counts=LENGTHS))
    longest = np.array([LENGTHS[batch].max() for batch in batches]).reshape(8, 8)
    assert (np.diff(longest, axis=1) <= 0).all()


@pytest.mark.parametrize("accumulation", [1, 2, 3, 8])
def test_no_rank_computes_the_longer_samples_all_the_time(accumulation: int) -> None:
    shuffled = order((512, 1.0), batch=4 * accumulation)
    ranks = [RankBatches(shuffled, rank=rank, world_size=4, rows=1, token_counts=LENGTHS) for rank in range(4)]
    tokens = [sum(int(LENGTHS[batch].sum()) for batch in rank) for rank in ranks]
    assert max(tokens) < 1.06 * min(tokens), tokens


def test_leaving_out_batches_gives_the_rest_of_the_uninterrupted_order() -> None:
    batches = RankBatches(order((512, 1.0), batch=64), rank=1, world_size=2, rows=4, token_counts=LENGTHS)
    batches.set_epoch(1)
    assert len(batches) == 64
    assert list(islice(batches, 21, None)) == list(batches)[21:]


def test_no_sample_of_more_than_half_a_million_is_lost() -> None:
    big = order((400_000, 1.0), (200_000, 0.5), batch=128)
    assert sum(len(batch) for batch in RankBatches(big, rank=0, world_size=16, rows=1)) == 4688 * 8
