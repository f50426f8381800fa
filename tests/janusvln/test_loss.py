"""The loss: what each token and each action weighs."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from janus_cluster.janusvln import loss

pytestmark = pytest.mark.train

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(4, 10, generator=GENERATOR)
TARGETS = torch.tensor([1, 2, 3, 4])
SEGMENTS = torch.tensor([1, 2, 4, 4])
CE = F.cross_entropy(LOGITS, TARGETS, reduction="none")


def terms(weights: list[float]) -> loss.TextTerms:
    return loss.text_terms(LOGITS, TARGETS, torch.tensor(weights), SEGMENTS)


def total(text: loss.TextTerms, action_sum: float, count: float, d: float, denominator: torch.Tensor | None) -> float:
    out = loss.combine(
        text, torch.tensor(action_sum), torch.tensor(count), action_loss_weight=d, denominator=denominator
    )
    return float(out[0])


def test_text_loss_is_the_weighted_mean() -> None:
    weights = [1.0, 0.5, 3.0, 1.0]
    expected = float((CE * torch.tensor(weights)).sum() / 5.5)
    assert total(terms(weights), 0.0, 0.0, 1.0, None) == pytest.approx(expected, rel=1e-6)


def test_weight_zero_means_zero() -> None:
    expected = float(CE[0] * 2.0 / 2.0)
    assert total(terms([2.0, 0.0, 0.0, 0.0]), 0.0, 0.0, 1.0, None) == pytest.approx(expected, rel=1e-6)


def test_small_weight_sums_are_divided_by_one() -> None:
    expected = float(CE[0] * 0.25)
    assert total(terms([0.25, 0.0, 0.0, 0.0]), 0.0, 0.0, 1.0, None) == pytest.approx(expected, rel=1e-6)


def test_action_loss_is_a_mean_and_counts_d_times() -> None:
    text = terms([0.0, 0.0, 0.0, 0.0])
    assert total(text, 6.0, 3.0, 0.5, None) == pytest.approx(1.0)


def test_denominator_replaces_both_counts() -> None:
    text = terms([1.0, 1.0, 1.0, 1.0])
    expected = float(CE.sum()) / 8.0 + 6.0 / 4.0
    assert total(text, 6.0, 3.0, 1.0, torch.tensor([8.0, 4.0])) == pytest.approx(expected, rel=1e-6)


def test_segments_are_summed_with_their_weights() -> None:
    text = terms([1.0, 0.5, 3.0, 1.0])
    expected = torch.stack((CE[0], 0.5 * CE[1], torch.tensor(0.0), 3 * CE[2] + CE[3]))
    assert torch.allclose(text.segment_loss_sum, expected)
    assert text.segment_weight_sum.tolist() == [1.0, 0.5, 0.0, 4.0]


def test_cross_entropy_is_computed_in_fp32_on_bf16_logits() -> None:
    rounded = LOGITS.bfloat16()
    text = loss.text_terms(rounded, TARGETS, torch.ones(4), SEGMENTS)
    expected = F.cross_entropy(rounded.float(), TARGETS, reduction="sum")
    assert text.weighted_sum.dtype == torch.float32
    assert torch.allclose(text.weighted_sum, expected, rtol=1e-6)


def test_label_at_position_zero_never_counts() -> None:
    labels = torch.tensor([[7, -100, 5, 6]])
    weights = torch.tensor([[4.0, 9.0, 1.0, 0.5]])
    assert loss.label_mask(labels).tolist() == [[False, True, True]]
    assert float(loss.text_weight_sum(labels, weights)) == 1.5


def test_negative_actions_are_no_targets() -> None:
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    actions = torch.tensor([2, -100, -1])
    assert float(loss.action_count(actions)) == 1.0
    expected = F.cross_entropy(logits[:1], actions[:1])
    assert torch.allclose(loss.action_loss_sum(logits, actions), expected)


def test_no_label_and_no_action_is_zero_with_a_graph() -> None:
    logits = torch.zeros(0, 10, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.long)
    text = loss.text_terms(logits, empty, torch.zeros(0), empty)
    action_logits = torch.zeros(1, 4, requires_grad=True)
    action_sum = loss.action_loss_sum(action_logits, torch.tensor([-100]))
    value, _, _ = loss.combine(text, action_sum, torch.tensor(0.0), action_loss_weight=1.0, denominator=None)
    value.backward()
    assert float(value.detach()) == 0.0
    assert action_logits.grad is not None


@pytest.mark.parametrize(("step", "weight"), [(0, 0.0), (1, 0.75), (2, 1.5), (4, 3.0), (400, 3.0)])
def test_the_action_weight_grows_evenly_and_stays(step: int, weight: float) -> None:
    assert loss.ramped_weight(step, ramp_steps=4, weight=3.0) == weight


def test_without_a_ramp_the_weight_is_whole_from_the_first_step() -> None:
    assert loss.ramped_weight(0, ramp_steps=0, weight=3.0) == 3.0
    with pytest.raises(ValueError, match="negative"):
        loss.ramped_weight(-1, ramp_steps=4, weight=3.0)
