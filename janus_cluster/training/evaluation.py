"""A trained model judged on episodes it has not seen, without a simulator:

    python -m janus_cluster.training.evaluation MODEL_OR_RUN --out DIR [--data ROOT …] [--generate 50]

The action head and the perplexity are measured on every sample, generated answers on some. `janus-cluster eval` starts
this and prints DIR/evaluation.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from janus_cluster.errors import JanusError, UsageError, print_error
from janus_cluster.janusvln.data.dataset import NavigationDataset
from janus_cluster.janusvln.data.samples import ACTIONS
from janus_cluster.janusvln.data.tokenizer import load_tokenizer
from janus_cluster.janusvln.held_out import (
    HeldOutScores,
    leave_out_head,
    render_score_line,
    render_score_table,
)
from janus_cluster.janusvln.model.janus import JanusConfig, JanusModel
from janus_cluster.janusvln.model.load import load_exported
from janus_cluster.janusvln.predictions import Prediction, generate_answers, predict_actions
from janus_cluster.janusvln.scores import ActionScores, count_confusion, score_actions
from janus_cluster.job.schema import SegmentWeights
from janus_cluster.run.streams import run_program
from janus_cluster.training.report import ShownSample, render_page, render_picture, write_report
from janus_cluster.training.subject import Subject, draw_indices, load_subject

GENERATED_BY_DEFAULT = 50
NEW_TOKENS_BY_DEFAULT = 256
SHOWN_AT_MOST = 50


def main(argv: Sequence[str] | None = None) -> int:
    """The evaluation is written to --out. Returns: the exit code; errors are printed on stderr."""
    arguments = _parse_arguments(argv)
    transformers_logging.disable_progress_bar()
    try:
        evaluate(arguments)
    except JanusError as error:
        return print_error(error)
    except KeyboardInterrupt:
        return 130
    return 0


def evaluate(arguments: argparse.Namespace) -> None:
    """The model is loaded, asked and judged, and the report is written.

    Raises: UsageError on a target, data or device that is not there; TrainingFailed on a sample that cannot be read.
    """
    began_s = time.perf_counter()
    subject = load_subject(arguments.target, roots=arguments.data, vggt_path=arguments.vggt_path)
    shown_samples = subject.load_samples()
    samples = shown_samples.samples
    if arguments.samples is not None:
        samples = [samples[i] for i in draw_indices(len(samples), arguments.samples)]
    tokenizer = load_tokenizer(subject.model)
    model = load_model(subject, choose_device(arguments.device))
    dataset = NavigationDataset(samples, tokenizer=tokenizer, data=subject.data, segment_weights=SegmentWeights())

    # The record of an export names no number of loaders, and this machine may have fewer cores than the nodes.
    num_workers = min(subject.data.num_workers, len(os.sched_getaffinity(0)))
    scores, predictions = predict_actions(
        model, dataset, pad_token_id=tokenizer.pad_token_id, num_workers=num_workers, report=_print
    )
    not_scored = None
    if not subject.has_action_head:
        not_scored = f"{subject.model} holds no action_head.*: loading draws one at random, so it is not scored"
        scores = leave_out_head(scores)
        predictions = [replace(prediction, head_action=None, head_probabilities=None) for prediction in predictions]
        _print(f"action head: {not_scored}")
    else:
        _print(render_score_line(scores))
    _print(render_score_table(scores))
    asked = draw_indices(len(samples), arguments.generate)
    answered = generate_answers(
        model, dataset, predictions, asked, tokenizer=tokenizer, max_new_tokens=arguments.max_new_tokens, report=_print
    )
    for index, prediction in zip(asked, answered, strict=True):
        predictions[index] = prediction

    shown = (asked or draw_indices(len(samples), SHOWN_AT_MOST))[:SHOWN_AT_MOST]
    generated = score_answers(answered) if answered else None
    evaluation = {
        "schema_version": 1,
        "model": str(subject.model),
        "data": [root.path for root in subject.data.roots],
        "held_out_only": subject.held_out_only,
        "split": None if shown_samples.held_out is None else shown_samples.held_out.counts(),
        "num_samples": len(samples),
        "num_episodes": len({prediction.episode for prediction in predictions}),
        "head_not_scored": not_scored,
        **_render_scores(scores, generated),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_new_tokens": arguments.max_new_tokens,
        "duration_s": time.perf_counter() - began_s,
    }
    page = _build_page(subject, evaluation, dataset, predictions, shown)
    paths = write_report(arguments.out, evaluation=evaluation, predictions=predictions, page=page)
    _print(f"written: {', '.join(map(str, paths.values()))}")


def choose_device(name: str | None) -> torch.device:
    """The named device; without a name the GPU if there is one. Raises: UsageError where cuda is not there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here", hint="--device cpu, or start it on a GPU node")
    return torch.device("cuda", 0) if name == "cuda" else torch.device("cpu")


def score_answers(predictions: Sequence[Prediction]) -> ActionScores:
    """The scores of the generated answers."""
    truth = [ACTIONS.index(p.action) for p in predictions]
    given = [None if p.generated_action is None else ACTIONS.index(p.generated_action) for p in predictions]
    return score_actions(count_confusion(truth, given))


def load_model(subject: Subject, device: torch.device) -> JanusModel:
    """The exported model in the precision it was saved in."""
    dtype = JanusConfig.from_pretrained(subject.model, local_files_only=True).dtype or torch.float32
    _print(f"loading {subject.model} on {device}, {str(dtype).removeprefix('torch.')}")
    return load_exported(subject.model, vggt_path=subject.vggt_path, device=device, dtype=dtype)


def _render_scores(scores: HeldOutScores, generated: ActionScores | None) -> dict[str, Any]:
    return {
        "actions": list(ACTIONS),
        "majority": {"action": scores.majority.action, "accuracy": scores.majority.accuracy},
        "head": scores.head.to_json(),
        "generated": None if generated is None else generated.to_json(),
        "perplexity_by_segment": dict(scores.perplexity_by_segment),
    }


def _build_page(
    subject: Subject,
    evaluation: dict[str, Any],
    dataset: NavigationDataset,
    predictions: Sequence[Prediction],
    shown: Sequence[int],
) -> str:
    samples = [
        ShownSample(
            prediction=predictions[index],
            pictures=tuple(render_picture(frame) for frame in dataset[index]["frames"].numpy()),
        )
        for index in shown
    ]
    head, majority, generated = evaluation["head"], evaluation["majority"], evaluation["generated"]
    summary = [
        f"{evaluation['num_samples']} samples of {evaluation['num_episodes']} episodes under "
        f"{', '.join(evaluation['data'])}; {len(samples)} of them here.",
        (
            f"Action head: {not_scored}"
            if (not_scored := evaluation["head_not_scored"]) is not None
            else f"Action head: accuracy {head['accuracy']:.3f}, macro F1 {head['macro_f1']:.3f}"
        )
        + f"; always {majority['action']}: {majority['accuracy']:.3f}.",
    ]
    if (split := evaluation["split"]) is not None and split["num_leaked_frames"]:
        summary.append(
            f"{split['num_leaked_frames']} of the {split['num_held_out_frames']} held-out frames are trained on too: "
            "these scores are no measure for new walks."
        )
    if generated is not None:
        summary.append(
            f"In words, {generated['num_samples']} samples: accuracy {generated['accuracy']:.3f}, "
            f"macro F1 {generated['macro_f1']:.3f}; {generated['num_unparsable']} answers name no action."
        )
    return render_page(f"Predictions of {subject.model}", summary, samples)


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m janus_cluster.training.evaluation", description=__doc__)
    parser.add_argument("target", type=Path, metavar="MODEL_OR_RUN", help="run folder, or exported folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", action="append", default=[], metavar="ROOT", help="path, or {path: …, images: …}")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--generate", type=int, default=GENERATED_BY_DEFAULT)
    parser.add_argument("--max-new-tokens", type=int, default=NEW_TOKENS_BY_DEFAULT)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--vggt-path")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_program(main)
