"""Names, comments, messages and documents are plain: they use none of a list of figurative words."""

from __future__ import annotations

import ast
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Each has a plain counterpart: reported, printed, arrived, is written, is, no process, another user, request, grew.
FIGURATIVE = (
    r"told|tells|telling|said|says?|saying|speaks|spoke|hears|heard|came|became|stands|stood|lies?|nobody|somebody"
    r"|anybody|whoever|wish(?:es|ed)?|vouch(?:es)?|burnt|obey(?:s|ed)?"
)
PHRASES = r"tell|for ever|by (?:it|them)sel(?:f|ves)|in so many words|without a word|own words?"
NAME = re.compile(FIGURATIVE, re.IGNORECASE)
PROSE = re.compile(rf"\b({FIGURATIVE}|{PHRASES})\b", re.IGNORECASE)
# Parsing every file takes seconds: one without such a beginning and end of a word, in any spelling, is not parsed.
ANYWHERE = re.compile(rf"(?:(?<![a-zA-Z])|(?=[A-Z]))(?i:{FIGURATIVE}|{PHRASES})(?![a-z])")
FOLDERS = ("janus_cluster", "templates", "jobs", "benchmarks", "docs", "tests")
FILES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml")
SUFFIXES = {".py", ".md", ".j2", ".yaml", ".sh", ".sbatch"}


def figurative_names(source: str) -> Iterator[tuple[int, str]]:
    """Line and name, for each identifier of Python code with a figurative word in it."""
    lines = iter(source.splitlines(keepends=True))
    for token in tokenize.generate_tokens(lambda: next(lines, "")):
        if token.type == tokenize.NAME:
            parts = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", token.string)
            if any(NAME.fullmatch(part) for part in parts):
                yield token.start[0], token.string


def figurative_prose(source: str) -> Iterator[tuple[int, str]]:
    """Line and words, for each comment, docstring and message of Python code. A string without a space is a key."""
    lines = iter(source.splitlines(keepends=True))
    for token in tokenize.generate_tokens(lambda: next(lines, "")):
        if token.type == tokenize.COMMENT and (found := PROSE.search(token.string)):
            yield token.start[0], found[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            for found in PROSE.finditer(node.value):
                line = node.lineno + node.value.count("\n", 0, found.start())
                yield min(line, node.end_lineno or line), found[0]


def figurative_lines(text: str) -> Iterator[tuple[int, str]]:
    """Line and words, for each line of a document or a template."""
    for number, line in enumerate(text.splitlines(), 1):
        if found := PROSE.search(line):
            yield number, found[0]


def figurative_words(path: Path) -> list[tuple[int, str]]:
    text = path.read_text(encoding="utf-8")
    if not ANYWHERE.search(text):
        return []
    if path.suffix == ".py":
        return sorted({*figurative_names(text), *figurative_prose(text)})
    return list(figurative_lines(text))


def written_by_us() -> list[Path]:
    """Every text of the project but this one. Measured results and captured numbers are none."""
    found = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.suffix in SUFFIXES and p.is_file()]
    return sorted({*found, *(ROOT / name for name in FILES)} - {Path(__file__).resolve()})


def test_no_text_uses_a_figurative_word() -> None:
    wrong = [f"{p.relative_to(ROOT)}:{line}: {word}" for p in written_by_us() for line, word in figurative_words(p)]
    assert not wrong, "name what it is:\n" + "\n".join(wrong)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_is_read(folder: str) -> None:
    assert any(path.is_relative_to(ROOT / folder) for path in written_by_us())


def test_a_figurative_name_is_found_in_every_spelling() -> None:
    source = "was_told = 1\nToldEnd = 2\nnow.told()\nf(said=3)\nretold, standing, SAIDs = 4, 5, 6\n"
    assert [line for line, _ in figurative_names(source)] == [1, 2, 3, 4]
    assert all(ANYWHERE.search(line) for line in source.splitlines()[:4])


def test_figurative_prose_is_found_in_comments_docstrings_and_messages() -> None:
    source = '"""One.\n\nWhat nobody knows.\n"""\nx = 1  # as Slurm said\ny = f"it lies in {x}"\nz = {"told": x}\n'
    assert sorted(figurative_prose(source)) == [(3, "nobody"), (5, "said"), (6, "lies")]


def test_figurative_words_of_a_document_are_found_by_line() -> None:
    assert list(figurative_lines("The log shows it.\nThe report LIES there.\n")) == [(2, "LIES")]
