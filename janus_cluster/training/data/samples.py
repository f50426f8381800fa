"""What a sample is, whatever file format it was read from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ACTIONS: tuple[str, ...] = ("STOP", "MOVE_FORWARD", "TURN_LEFT", "TURN_RIGHT")

# Text of a data set that reads as one of the tokenizer's control tokens would add an image or end the turn.
CONTROL_TEXT = re.compile(r"<\|[^|<>\s]+\|>")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One decision: what was asked, what was seen (oldest first, current last), what was done."""

    id: str
    episode: str
    instruction: str
    subinstruction: str
    description_2d: str
    description_3d: str
    action: int
    frames: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """A file or folder that could not be used, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def parse_action(text: str) -> int | None:
    """Return the label of an action's name in any case, None for a name that is no action."""
    name = text.strip().upper()
    return ACTIONS.index(name) if name in ACTIONS else None


def find_control_text(*texts: str) -> str | None:
    """Return the first control token that occurs in the texts, None where there is none."""
    for text in texts:
        if match := CONTROL_TEXT.search(text):
            return match.group()
    return None
