"""What a narrow terminal has room for: columns of a table, words of a line.

A figure is never cut: half a number would be a wrong one. A command and a path stay whole, so that they can be copied.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence

_COPIED = re.compile(r"janus-cluster |--set |(?:^|\s)next: ")


def columns_to_drop(widths: Mapping[str, int], *, width: int | None, gap: int, droppable: Sequence[str]) -> list[str]:
    """The first of `droppable` without which the others stand side by side; all of them where that is not enough.

    Units: widths, gap and width in columns of the terminal; width None: no limit.
    """
    dropped: list[str] = []
    for name in droppable:
        kept = [cells for heading, cells in widths.items() if heading not in dropped]
        if width is None or sum(kept) + gap * (len(kept) - 1) <= width:
            break
        dropped.append(name)
    return dropped


def fold_line(line: str, *, width: int | None, indent: int | None = None) -> str:
    """The line folded at blanks, its continuation indented below it; one with a command in it is left as it is.

    Units: width and indent in columns; width None: no limit; indent None: two more than the line's own.
    """
    if width is None or len(line) <= width or _COPIED.search(line):
        return line
    below = " " * (len(line) - len(line.lstrip()) + 2 if indent is None else indent)
    return textwrap.fill(line, width, subsequent_indent=below, break_long_words=False, break_on_hyphens=False)
