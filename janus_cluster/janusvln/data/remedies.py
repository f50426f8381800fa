"""What to type where a data set spells actions in its own way, or names frames by their places on another machine."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from janus_cluster.janusvln.data.samples import Problem

SPELLINGS_SHOWN = 12
PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z_ ]*", re.ASCII)
# What a spelling holds that can mean one action only.
SIGNS = {
    "STOP": ("STOP",),
    "MOVE_FORWARD": ("FORWARD", "↑"),
    "TURN_LEFT": ("LEFT", "←"),
    "TURN_RIGHT": ("RIGHT", "→"),
}


def find_remedies(problems: Sequence[Problem], beside: Iterable[Path]) -> list[str]:
    """A line for each kind of problem that a key of the job mends; none where there is no such problem.

    beside: the folders under which relative paths of frames were looked for.
    """
    return [line for line in (_spell_actions(problems), _move_frames(problems, tuple(beside))) if line]


def _spell_actions(problems: Sequence[Problem]) -> str:
    found = Counter(problem.detail for problem in problems if problem.kind == "action")
    if not found:
        return ""
    shown = [spelling for spelling, _ in found.most_common(SPELLINGS_SHOWN)]
    counts = ", ".join(f"{spelling} {found[spelling]:,}" for spelling in shown)
    more = f" and {len(found) - len(shown)} more" if len(found) > len(shown) else ""
    table = ", ".join(f"{_quoted(spelling)}: {_guess(spelling)}" for spelling in shown)
    return f"unknown actions ({counts}{more}): give the meaning of each, --set 'data.actions={{{table}}}'"


def _guess(spelling: str) -> str:
    """The action that the spelling can only mean, or dots."""
    meant = [action for action, signs in SIGNS.items() if any(sign in spelling.upper() for sign in signs)]
    return meant[0] if len(meant) == 1 else "…"


def _move_frames(problems: Sequence[Problem], beside: Sequence[Path]) -> str:
    """Frames whose folder is not there either, at a place that is not the data set's own."""
    for problem in problems:
        if problem.kind != "missing" or any(problem.path.is_relative_to(folder) for folder in beside):
            continue
        if place := _first_absent(problem.path.parent):
            return (
                f"frames under {place} are elsewhere here: --set 'data.image_roots={{{_quoted(str(place))}: /where}}'"
            )
    return ""


def _first_absent(folder: Path) -> Path | None:
    """The outermost folder of the path that is not there."""
    absent = None
    for place in (folder, *folder.parents):
        if place.exists():
            break
        absent = place
    return absent


def _quoted(key: str) -> str:
    """A key as YAML has it within a shell's single quotes."""
    text = key if PLAIN_KEY.fullmatch(key) or re.fullmatch(r"/[\w./-]+", key) else json.dumps(key, ensure_ascii=False)
    return text.replace("'", "'\\''")
