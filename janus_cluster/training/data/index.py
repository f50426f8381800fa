"""Roots of the job file -> the samples to train on and the ones held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from janus_cluster.config.schema import Data
from janus_cluster.errors import UsageError
from janus_cluster.training.data.episodes import MILESTONES_NAME, episode_samples, load_episodes
from janus_cluster.training.data.samples import Problem, Sample

PROBLEMS_SHOWN = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleSplit:
    """Samples by episode, and everything that could not be used."""

    train: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    problems: tuple[Problem, ...]

    def describe(self) -> str:
        """Lines for a log: how many samples and episodes, and the first problems."""
        counts = ", ".join(
            f"{name} {len(samples)} samples of {len({s.episode for s in samples})} episodes"
            for name, samples in (("training", self.train), ("held out", self.held_out))
        )
        return "\n".join([counts, *_problem_lines(self.problems)])


def load_samples(data: Data, *, seed: int, pad_history: bool = False) -> SampleSplit:
    """Every usable sample under `data.roots`, split by episode; the same on every rank.

    Raises: UsageError if a root is no folder, or nothing usable lies under them.
    """
    if not data.roots:
        raise UsageError("data.roots is empty", hint="name one or more folders of episode folders in data.roots")
    samples: list[Sample] = []
    problems: list[Problem] = []
    for root in data.roots:
        found, wrong = _load_root(Path(root.path), max_history=data.history, pad_history=pad_history)
        samples += found
        problems += wrong
    if not samples:
        raise _nothing_usable([root.path for root in data.roots], problems)
    held_out_names = choose_held_out([s.episode for s in samples], fraction=data.validation_fraction, seed=seed)
    return SampleSplit(
        train=tuple(s for s in samples if s.episode not in held_out_names),
        held_out=tuple(s for s in samples if s.episode in held_out_names),
        problems=tuple(problems),
    )


def choose_held_out(episodes: Iterable[str], *, fraction: float, seed: int) -> frozenset[str]:
    """Names of the held-out episodes: the share with the lowest hash of seed and name.

    With a fraction above 0 and two episodes or more, at least one is held out and at least one is trained on. A new
    episode moves few of the others from one side to the other.
    """
    names = sorted(set(episodes))
    if fraction <= 0 or len(names) < 2:
        return frozenset()
    count = min(max(round(fraction * len(names)), 1), len(names) - 1)
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    return frozenset(ranked[:count])


def _load_root(root: Path, *, max_history: int, pad_history: bool) -> tuple[list[Sample], list[Problem]]:
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise UsageError(f"data.roots: {root} {what}", hint="data.roots names folders of episode folders")
    if (root / MILESTONES_NAME).is_file():
        raise UsageError(
            f"data.roots: {root} is an episode, expected a folder of episodes", hint=f"give its parent: {root.parent}"
        )
    episodes, problems = load_episodes(root)
    samples = [s for e in episodes for s in episode_samples(e, max_history=max_history, pad_history=pad_history)]
    return samples, problems


def _problem_lines(problems: Sequence[Problem]) -> list[str]:
    if not problems:
        return []
    lines = [f"{len(problems)} problems in the data:", *(f"  {p}" for p in problems[:PROBLEMS_SHOWN])]
    if len(problems) > PROBLEMS_SHOWN:
        lines.append(f"  … and {len(problems) - PROBLEMS_SHOWN} more")
    return lines


def _nothing_usable(roots: Sequence[str], problems: Sequence[Problem]) -> UsageError:
    lines = [f"no usable sample under {', '.join(roots)}"]
    lines += _problem_lines(problems) or ["there is no folder in it"]
    return UsageError(
        "\n".join(lines),
        hint=f"an episode folder holds {MILESTONES_NAME}, step_0000_ACTION.png and step_0000_ACTION.json",
    )
