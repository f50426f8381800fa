"""How good predictions are, from counts alone. Pure functions of numbers: no torch, no disk.

A confusion table has a row per true action and a column per predicted one, in the order of ACTIONS, and a last column
for answers that name no action.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from janus_cluster.janusvln.data.samples import ACTIONS

Confusion = Sequence[Sequence[int]]

# The name must fill the rest of its line: "ACTION: STOP." and "ACTION: stop" are not what the model was taught.
_ACTION_LINE = re.compile(r"^ACTION:(.*)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassScore:
    """One action. A ratio is None where nothing is there to divide by; `support` is how often it was true."""

    precision: float | None
    recall: float | None
    f1: float | None
    support: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ActionScores:
    """All actions together. Macro F1 is the plain mean over the actions that were true or predicted at least once."""

    num_samples: int
    num_unparsable: int
    accuracy: float | None
    macro_f1: float | None
    by_action: Mapping[str, ClassScore]
    confusion: Confusion

    def to_json(self) -> dict[str, Any]:
        """Plain values, as in evaluation.json."""
        scores = {action: asdict(score) for action, score in self.by_action.items()}
        return {
            "num_samples": self.num_samples,
            "num_unparsable": self.num_unparsable,
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "by_action": scores,
            "confusion": [list(row) for row in self.confusion],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Majority:
    """What always giving the most frequent true action would score."""

    action: str
    accuracy: float | None


def parse_action_line(answer: str) -> int | None:
    """The label of the answer's one `ACTION: NAME` line; None where there is no such line, several, or no such name."""
    lines = _ACTION_LINE.findall(answer)
    return parse_action_word(lines[0]) if len(lines) == 1 else None


def parse_action_word(answer: str) -> int | None:
    """The label of an answer that is an action's name and nothing else: what is taught without descriptions."""
    name = answer.strip()
    return ACTIONS.index(name) if name in ACTIONS else None


def parse_answer(answer: str, *, four_parts: bool) -> int | None:
    """The label that an answer names; its form is that of the target: four parts, or the action alone."""
    return parse_action_line(answer) if four_parts else parse_action_word(answer)


def count_confusion(truth: Sequence[int], predicted: Sequence[int | None]) -> list[list[int]]:
    """The confusion table of pairs; a true action below 0 is none, and its pair is left out."""
    table = [[0] * (len(ACTIONS) + 1) for _ in ACTIONS]
    for true, given in zip(truth, predicted, strict=True):
        if true >= 0:
            table[true][len(ACTIONS) if given is None else given] += 1
    return table


def score_actions(confusion: Confusion) -> ActionScores:
    """Accuracy, precision, recall and F1. An answer that names no action is wrong: it lowers recall, no precision."""
    num_samples = sum(map(sum, confusion))
    by_action = {action: _score_class(confusion, index) for index, action in enumerate(ACTIONS)}
    f1s = [score.f1 for score in by_action.values() if score.f1 is not None]
    return ActionScores(
        num_samples=num_samples,
        num_unparsable=sum(row[len(ACTIONS)] for row in confusion),
        accuracy=_ratio(sum(confusion[i][i] for i in range(len(ACTIONS))), num_samples),
        macro_f1=sum(f1s) / len(f1s) if f1s else None,
        by_action=by_action,
        confusion=confusion,
    )


def score_majority(confusion: Confusion) -> Majority:
    """The most frequent true action, the first of several, and its share."""
    counts = [sum(row) for row in confusion]
    return Majority(action=ACTIONS[counts.index(max(counts))], accuracy=_ratio(max(counts), sum(counts)))


def perplexities(
    names: Sequence[str], loss_sums: Sequence[float], token_counts: Sequence[float]
) -> dict[str, float | None]:
    """exp(Σ CE / tokens) of each named segment; None where it has no tokens, or the value is too large for a float."""
    found: dict[str, float | None] = {}
    for name, loss_sum, count in zip(names, loss_sums, token_counts, strict=True):
        try:
            value = math.exp(loss_sum / count) if count else math.nan
        except OverflowError:
            value = math.inf
        found[name] = value if math.isfinite(value) else None
    return found


def _score_class(confusion: Confusion, index: int) -> ClassScore:
    hits = confusion[index][index]
    support = sum(confusion[index])
    num_predicted = sum(row[index] for row in confusion)
    return ClassScore(
        precision=_ratio(hits, num_predicted),
        recall=_ratio(hits, support),
        f1=_ratio(2 * hits, support + num_predicted),
        support=support,
    )


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
