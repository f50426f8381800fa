"""The content of a Markdown page: its fenced blocks, inline code, table rows and links; and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
READMES = (ROOT / "README.md", ROOT / "README.zh-CN.md")
PAGES = (
    *READMES,
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
)
# `<!-- needs: cluster -->` on the line before a bash block: it cannot run on any machine, so no test runs it.
NEEDS = ("cluster", "gpu", "network", "minutes", "the demo", "a trained model", "an interactive shell")

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NEEDS = re.compile(r"<!-- needs: (.+?) -->\s*$")
_INLINE = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, text, line in the page, and what it needs to run."""

    page: Path
    line: int
    language: str
    text: str
    needs: str | None

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        before = text[: match.start()]
        marker = _NEEDS.search(before.rstrip("\n"))
        found.append(Block(page, before.count("\n") + 1, match[1], match[2], marker[1] if marker else None))
    return found


def inline_code(page: Path) -> list[str]:
    """Code between single backticks, a table's escaped pipes as pipes."""
    prose = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(code.split()).replace("\\|", "|") for code in _INLINE.findall(prose)]


def links(page: Path) -> list[str]:
    return _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8")))


def table_commands(page: Path) -> list[list[str]]:
    """For each table row, the code in its first cell."""
    prose = _FENCE.sub("", page.read_text(encoding="utf-8"))
    rows = [re.split(r"(?<!\\)\|", line) for line in prose.splitlines() if line.startswith("|")]
    return [_INLINE.findall(cells[1]) or [cells[1].strip()] for cells in rows if "`" in cells[1] or "---" in cells[1]]


def our_commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Every `janus-cluster …` of the page, as written, and its words; a usage line gives one for each alternative."""
    lines = [line for block in blocks(page) for line in block.text.replace("\\\n", " ").splitlines()]
    for code in [*lines, *inline_code(page)]:
        # In a block a comment begins at two spaces or at the line's beginning.
        command = re.split(r"(?:^|\s)#\s", code)[0]
        for match in re.finditer(r"(?:^|(?<=[\s(/;]))janus-cluster ([^;&>]*)", command):
            for usage in _alternatives(match[1]):
                words = shlex.split(usage)
                end = min((words.index(pipe) for pipe in ("|", "||") if pipe in words), default=len(words))
                yield code.strip(), words[:end]


def _alternatives(usage: str) -> list[str]:
    """`a [b|c D]` is `a b` and `a c D`; a word `x|y` is a line for each; a `…` is an option's value, or nothing."""
    usage = usage.replace("[-", " [-")
    found = [usage]
    while any("[" in text for text in found):
        text = next(t for t in found if "[" in t)
        found.remove(text)
        inner = re.search(r"\[([^\[\]]*)\]", text)
        assert inner is not None, usage
        choices = (
            inner[1].split("|") if re.search(r"\|\w+ ", inner[1]) and "--" not in inner[1].split()[0] else [inner[1]]
        )
        found += [text[: inner.start()] + choice + text[inner.end() :] for choice in choices]
    return [line for text in found for line in _word_choices(text)]


def _word_choices(text: str) -> list[str]:
    words = re.findall(r"'[^']*'|\"[^\"]*\"|\S+", text)
    kept = [w for i, w in enumerate(words) if w != "…" or (i and words[i - 1].startswith("-"))]
    lines = [[]]
    for word in kept:
        options = word.split("|") if "|" in word.strip("|") and word[0] not in "'\"" else [word]
        lines = [[*line, option] for line in lines for option in options]
    return [" ".join(line) for line in lines]
