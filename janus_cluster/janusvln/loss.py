"""The training loss: weighted cross-entropy on the text, cross-entropy on the action. Pure functions of tensors.

Shape legend: B samples, L positions, N label positions of the batch, V vocabulary, A actions.
The token at position t is predicted at t-1, so the label at position 0 never counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100
SEGMENT_NAMES = ("subinstruction", "description_2d", "description_3d", "action")


@dataclass(frozen=True, kw_only=True)
class TextTerms:
    """Sums over the label positions; divide only after adding up ranks and micro-steps."""

    weighted_sum: Tensor
    weight_sum: Tensor
    segment_loss_sum: Tensor
    segment_weight_sum: Tensor


def label_mask(labels_BL: Tensor) -> Tensor:
    """True at [b, t] where the hidden state at t predicts a label. Shapes: [B, L] in, [B, L-1] out."""
    return labels_BL[:, 1:] != IGNORE_INDEX


def text_weight_sum(labels_BL: Tensor, loss_weights_BL: Tensor) -> Tensor:
    """Σw over the positions that count, fp32: what `loss_denominator[0]` is added up from."""
    return (loss_weights_BL[:, 1:].float() * label_mask(labels_BL)).sum()


def action_count(actions_B: Tensor) -> Tensor:
    """How many samples have an action target, fp32: what `loss_denominator[1]` is added up from."""
    return (actions_B >= 0).sum().float()


def ramped_weight(step: int, *, ramp_steps: int, weight: float) -> float:
    """d at optimizer step `step` (0 is the first): grows evenly from 0 and is `weight` from step `ramp_steps` on.

    Raises: ValueError on a negative step.
    """
    if step < 0:
        raise ValueError(f"step {step} is negative")
    return weight if step >= ramp_steps else weight * step / ramp_steps


def text_terms(logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor, segments_N: Tensor) -> TextTerms:
    """Weighted and per-segment sums of the token cross-entropy, computed in fp32 for logits of any type.

    A weight of 0 takes a token out of the loss and out of its segment's figure, Σ(w·CE)/Σw of the segment.
    Shapes: segments hold 1..4 (SEGMENT_NAMES), 0 for none; the segment sums are [4] and detached.
    """
    losses_N = F.cross_entropy(logits_NV.float(), targets_N, reduction="none")
    weights_N = weights_N.float()
    weighted_N = losses_N * weights_N
    values = torch.stack((weighted_N.detach(), weights_N))
    per_segment = values.new_zeros(2, len(SEGMENT_NAMES) + 1).index_add(1, segments_N, values)[:, 1:]
    return TextTerms(
        weighted_sum=weighted_N.sum(),
        weight_sum=weights_N.sum(),
        segment_loss_sum=per_segment[0],
        segment_weight_sum=per_segment[1],
    )


def action_loss_sum(logits_BA: Tensor, actions_B: Tensor) -> Tensor:
    """Summed cross-entropy of the actions in fp32; a negative action is no target."""
    targets = actions_B.masked_fill(actions_B < 0, IGNORE_INDEX)
    return F.cross_entropy(logits_BA.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")


def combine(
    text: TextTerms, action_sum: Tensor, num_actions: Tensor, *, action_loss_weight: float, denominator: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Total, text and action loss: Σ(w·CE)/D_text + d · Σ CE_action/D_action.

    `denominator` is [D_text, D_action]. Without it only this batch counts: max(1, Σw) and max(1, number of actions).
    Returns: (total with its graph, text, action without d).
    """
    if denominator is None:
        denominator = torch.stack((text.weight_sum, num_actions)).clamp(min=1.0)
    per_text, per_action = denominator.float().unbind()
    text_loss = text.weighted_sum / per_text
    action_loss = action_sum / per_action
    return text_loss + action_loss_weight * action_loss, text_loss, action_loss
