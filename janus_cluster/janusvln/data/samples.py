"""A sample, of any file format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

ACTIONS: tuple[str, ...] = ("STOP", "MOVE_FORWARD", "TURN_LEFT", "TURN_RIGHT")

# Text of a data set that reads as one of the tokenizer's control tokens would add an image or end the turn.
CONTROL_TEXT = re.compile(r"<\|[^|<>\s]+\|>")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One decision: what was asked, what was seen (oldest first, current last), what was done.

    Without descriptions the target is the plain action. `user_parts` is the user's turn as the data set
    wrote it, cut at the images (one part more than frames); without it the prompt is made of the instruction.
    `frame_sizes`: width and height of each frame's file when the index was made; empty where that is not known.
    """

    id: str
    episode: str
    instruction: str
    subinstruction: str
    description_2d: str
    description_3d: str
    action: int
    frames: tuple[Path, ...]
    user_parts: tuple[str, ...] | None = None
    frame_sizes: tuple[tuple[int, int], ...] = ()

    @property
    def has_four_parts(self) -> bool:
        """Whether the target is the four parts; of them the sub-instruction may be empty."""
        return bool(self.description_2d)

    def without_oldest_frame(self) -> Sample:
        """The sample with one frame of history less. Raises: ValueError if it shows the current frame only."""
        if len(self.frames) < 2:
            raise ValueError(f"sample {self.id} has no history to shorten")
        parts = self.user_parts
        if parts is not None:
            parts = (parts[0] + parts[1], *parts[2:])
        return replace(self, frames=self.frames[1:], frame_sizes=self.frame_sizes[1:], user_parts=parts)


@dataclass(frozen=True, slots=True)
class Problem:
    """A file, folder or record that could not be used, why, and how many samples were lost by it.

    `kind` is of those that are counted together: "absent", a trajectory that was never rendered (no fault of the data,
    nothing is lost by it), with the language of its instruction as `detail`; "action", with the spelling that is
    unknown; "missing", a frame that is not there.
    """

    path: Path
    reason: str
    lost: int = 0
    kind: Literal["", "absent", "action", "missing"] = ""
    detail: str = ""

    @property
    def absent(self) -> bool:
        """Is it a trajectory that was never rendered?"""
        return self.kind == "absent"

    def __str__(self) -> str:
        # Names on disk may be bytes of any encoding, which a log in UTF-8 would refuse to print.
        return f"{self.path}: {self.reason}".encode("utf-8", "backslashreplace").decode("utf-8")


def parse_action(value: object, spellings: Mapping[str, str] | None = None) -> int | None:
    """Return the label of an action's name in any case or of a number 0..3, None for what is no action.

    `spellings`: other names, in capitals, and the action that each means; numbers too, as text.
    """
    if spellings and isinstance(value, (str, int)) and (name := spellings.get(str(value).strip().upper())):
        return ACTIONS.index(name)
    if isinstance(value, str):
        name = value.strip().upper()
        return ACTIONS.index(name) if name in ACTIONS else None
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(ACTIONS):
        return value
    return None


def find_control_text(*texts: str) -> str | None:
    """Return the first control token that occurs in the texts, None where there is none."""
    for text in texts:
        if match := CONTROL_TEXT.search(text):
            return match.group()
    return None


def judge_text(*texts: str) -> str | None:
    """Return why the texts cannot be tokenised as what they are, None where they can."""
    if control := find_control_text(*texts):
        return f"holds the control token {control}"
    for text in texts:
        if any("\ud800" <= character <= "\udfff" for character in text):
            return "holds half of a surrogate pair, which is no text"
    return None
