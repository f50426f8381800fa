"""The action head and the text loss on samples that were not trained on, shared out among the ranks.

Every rank computes the same number of batches, since under ZeRO-3 all of them must take part in each; what a rank
computes only to keep step is not counted, so every sample counts exactly once.
B samples of a batch · A actions
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

from janus_cluster.janusvln.data.loader import build_loader, stuck_workers_named
from janus_cluster.janusvln.data.samples import ACTIONS
from janus_cluster.janusvln.loss import SEGMENT_NAMES
from janus_cluster.janusvln.scores import (
    ActionScores,
    Majority,
    count_confusion,
    perplexities,
    score_actions,
    score_majority,
)

Batch = dict[str, Any]
Collate = Callable[[Sequence[Batch]], Batch]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutScores:
    """Scores of the action head and the text loss. Perplexities are unweighted, for any loss weights."""

    head: ActionScores
    majority: Majority
    perplexity_by_segment: Mapping[str, float | None]


def leave_out_head(scores: HeldOutScores) -> HeldOutScores:
    """The same where the action head is drawn at random: no sample counts for it."""
    return replace(scores, head=score_actions(count_confusion([], [])))


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchResult:
    """One batch that counts: its samples' indices, action logits [B, A], actions [B], Σ CE and tokens per segment."""

    indices: Sequence[int]
    action_logits: Tensor
    actions: Tensor
    segment_loss_sum: Tensor
    segment_tokens: Tensor


def share_batches(num_samples: int, *, rank: int, world_size: int, rows: int) -> tuple[list[list[int]], int]:
    """The batches that this rank computes, as many on every rank, and how many of them count.

    Together the ranks' counted batches hold every index once; what follows them repeats sample 0.
    """
    own = list(range(rank, num_samples, world_size))
    counted = [own[start : start + rows] for start in range(0, len(own), rows)]
    num_batches = -(-len(range(0, num_samples, world_size)) // rows)
    return counted + [[0]] * (num_batches - len(counted)), len(counted)


def predict_batches(
    model: nn.Module,
    dataset: Dataset[Batch],
    *,
    num_samples: int,
    collate: Collate,
    device: torch.device,
    rows: int,
    num_workers: int,
    timeout_s: float = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[BatchResult]:
    """This rank's share, one batch at a time, with `model` in evaluation mode and no gradients."""
    batches, num_counted = share_batches(num_samples, rank=rank, world_size=world_size, rows=rows)
    loader = build_loader(
        dataset,
        batches=batches,
        collate=collate,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        timeout_s=timeout_s,
    )
    was_training = model.training
    model.eval()
    try:
        with stuck_workers_named():
            for number, batch in enumerate(loader):
                with torch.no_grad():
                    inputs = move_to(batch, device)
                    # Weights of 1 make the segment sums what perplexity is defined by: Σ CE and the number of tokens.
                    output = model(**inputs | {"loss_weights": torch.ones_like(inputs["loss_weights"])})
                if number < num_counted:
                    yield BatchResult(
                        indices=batches[number],
                        action_logits=output.action_logits,
                        actions=inputs["actions"],
                        segment_loss_sum=output.segment_loss_sum,
                        segment_tokens=output.segment_weight_sum,
                    )
    finally:
        model.train(was_training)


class ScoreSums:
    """Adds up batches; the sums of all ranks make the scores."""

    def __init__(self, device: torch.device) -> None:
        # fp64: 2^24 tokens would already be too many to count in fp32
        self._pairs = torch.zeros(len(ACTIONS) * len(ACTIONS), dtype=torch.float64, device=device)
        self._segments = torch.zeros(2 * len(SEGMENT_NAMES), dtype=torch.float64, device=device)

    def add(self, result: BatchResult) -> None:
        """The batch counts; of its samples those that have an action."""
        known = result.actions >= 0
        cells = result.actions[known] * len(ACTIONS) + result.action_logits.argmax(-1)[known]
        self._pairs += torch.bincount(cells, minlength=len(self._pairs))
        self._segments += torch.cat((result.segment_loss_sum, result.segment_tokens))

    def scores(self) -> HeldOutScores:
        """The scores of everything added on every rank; every rank calls this, and each gets the same."""
        sums = torch.cat((self._pairs, self._segments))
        if dist.is_initialized():
            dist.all_reduce(sums)
        pairs, segments = sums[: len(self._pairs)], sums[len(self._pairs) :]
        losses, tokens = segments.view(2, -1).tolist()
        confusion = [[*row, 0] for row in pairs.view(len(ACTIONS), -1).to(torch.int64).tolist()]
        return HeldOutScores(
            head=score_actions(confusion),
            majority=score_majority(confusion),
            perplexity_by_segment=perplexities(SEGMENT_NAMES, losses, tokens),
        )


def move_to(data: Any, device: torch.device) -> Any:
    """`data` on the device, through dictionaries and lists, with its dtypes kept."""
    if isinstance(data, Tensor):
        return data.to(device, non_blocking=data.is_pinned())
    if isinstance(data, dict):
        return {key: move_to(value, device) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [move_to(value, device) for value in data]
    return data


def render_score_line(scores: HeldOutScores) -> str:
    """One line for a log: accuracy against the majority class."""
    head, majority = scores.head, scores.majority
    return (
        f"held-out action accuracy {_number(head.accuracy, 2)} (majority class {_number(majority.accuracy, 2)}, "
        f"{majority.action}, {head.num_samples} samples), macro F1 {_number(head.macro_f1, 2)}"
    )


def render_score_table(scores: HeldOutScores) -> str:
    """Lines for a log: each action's precision, recall and F1, and each segment's perplexity."""
    lines = [f"  {'action':<14} {'precision':>9} {'recall':>7} {'F1':>6} {'samples':>8}"]
    lines += [
        f"  {action:<14} {_number(s.precision, 2):>9} {_number(s.recall, 2):>7} {_number(s.f1, 2):>6} {s.support:>8}"
        for action, s in scores.head.by_action.items()
    ]
    segments = ", ".join(
        f"{name} {'—' if value is None else f'{value:.4g}'}" for name, value in scores.perplexity_by_segment.items()
    )
    return "\n".join([*lines, f"  perplexity: {segments}"])


def _number(value: float | None, digits: int) -> str:
    return "—" if value is None else f"{value:.{digits}f}"
