"""A model's predictions of single samples: the action head's for all of them, generated text for some."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from janus_cluster.janusvln.data.dataset import NavigationDataset, collate
from janus_cluster.janusvln.data.prompt import render_target_parts
from janus_cluster.janusvln.data.samples import ACTIONS, Sample
from janus_cluster.janusvln.held_out import HeldOutScores, ScoreSums, predict_batches
from janus_cluster.janusvln.loss import IGNORE_INDEX
from janus_cluster.janusvln.model.generate import generate_text
from janus_cluster.janusvln.model.janus import JanusModel
from janus_cluster.janusvln.scores import parse_answer

PROGRESS_EVERY_S = 10.0

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One sample, its target, and the model's predictions. Without `generated` no text was generated.

    `head_action` is None where the model's action head was not trained: its output is random.
    `stopped` is False where the answer was longer than allowed; `generated_action` None: it names no action.
    """

    id: str
    episode: str
    instruction: str
    frames: tuple[str, ...]
    action: str
    target: str
    head_action: str | None
    head_probabilities: Mapping[str, float] | None
    generated: str | None = None
    generated_action: str | None = None
    stopped: bool | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values: one line of predictions.jsonl."""
        return asdict(self)


def predict_actions(
    model: JanusModel, dataset: NavigationDataset, *, pad_token_id: int, num_workers: int, report: Report
) -> tuple[HeldOutScores, list[Prediction]]:
    """The action head's answer to every sample, in their order, and the scores of all."""
    sums, found = ScoreSums(model.device), []
    progress = _Progress("action head", len(dataset), report)
    # One sample at a time: no padding, so the memory that the longest sample needs is all that is needed.
    results = predict_batches(
        model,
        dataset,
        num_samples=len(dataset),
        collate=partial(collate, pad_token_id=pad_token_id),
        device=model.device,
        rows=1,
        num_workers=num_workers,
    )
    for result in results:
        sums.add(result)
        probabilities = result.action_logits.softmax(-1)[0].tolist()
        found.append(_describe(dataset.samples[result.indices[0]], probabilities))
        progress.step()
    return sums.scores(), found


def generate_answers(
    model: JanusModel,
    dataset: NavigationDataset,
    predictions: Sequence[Prediction],
    indices: Sequence[int],
    *,
    tokenizer: Any,
    max_new_tokens: int,
    report: Report,
) -> list[Prediction]:
    """The predictions at `indices`, with the model's generated answer to the same prompt."""
    progress = _Progress("answers in words", len(indices), report)
    answered = []
    for index in indices:
        item = dataset[index]
        prompt_length = int((item["labels"] != IGNORE_INDEX).int().argmax())
        text, has_stopped = generate_text(
            model,
            tokenizer,
            input_ids_L=item["input_ids"][:prompt_length],
            mm_token_type_ids_L=item["mm_token_type_ids"][:prompt_length],
            frames_S3HW=item["frames"],
            image_grid_thw=item["image_grid_thw"],
            max_new_tokens=max_new_tokens,
        )
        label = parse_answer(text, four_parts=dataset.samples[index].has_four_parts)
        answered.append(
            replace(
                predictions[index],
                generated=text,
                generated_action=None if label is None else ACTIONS[label],
                stopped=has_stopped,
            )
        )
        progress.step()
    return answered


def _describe(sample: Sample, probabilities: Sequence[float]) -> Prediction:
    best = torch.tensor(probabilities).argmax()
    return Prediction(
        id=sample.id,
        episode=sample.episode,
        instruction=sample.instruction,
        frames=tuple(str(path) for path in sample.frames),
        action=ACTIONS[sample.action],
        target="".join(part.text for part in render_target_parts(sample) if not part.closing),
        head_action=ACTIONS[int(best)],
        head_probabilities=dict(zip(ACTIONS, probabilities, strict=True)),
    )


class _Progress:
    """Reports progress now and then, and the end once."""

    def __init__(self, what: str, total: int, report: Report) -> None:
        self._what, self._total, self._report = what, total, report
        self._done = 0
        self._began_s = self._reported_s = time.perf_counter()

    def step(self) -> None:
        self._done += 1
        now_s = time.perf_counter()
        if self._done == self._total or now_s - self._reported_s > PROGRESS_EVERY_S:
            self._reported_s = now_s
            self._report(f"{self._what}: {self._done} of {self._total} samples, {now_s - self._began_s:.0f} s")
