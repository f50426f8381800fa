"""CONTRIBUTING.md: the files and functions of its walks exist, in walks that visit no file twice."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from pages import ROOT, inline_code

PAGE = ROOT / "CONTRIBUTING.md"
_STOP = re.compile(r"^\| `([^`]+)` \|(?: `([^`]+)`)? \| .+ \|$", re.MULTILINE)


def walks() -> dict[str, list[tuple[str, str]]]:
    """By heading: the stops of a walk, file and function (empty for a template)."""
    text = PAGE.read_text(encoding="utf-8").partition("## A walk through the code\n")[2]
    sections = re.split(r"^### (.+)$", text, flags=re.MULTILINE)[1:]
    return {heading: _STOP.findall(body) for heading, body in zip(sections[::2], sections[1::2], strict=True)}


def functions_of(path: Path) -> set[str]:
    """Functions and classes of a module, and `Class.method`."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return names


def test_there_are_three_walks_with_many_stops() -> None:
    assert [len(stops) >= 10 for stops in walks().values()] == [True] * 3


@pytest.mark.parametrize("heading", walks())
def test_every_stop_of_a_walk_exists(heading: str) -> None:
    for file, function in walks()[heading]:
        path = ROOT / file
        assert path.is_file(), file
        assert (path.suffix == ".py") == bool(function), f"{file} {function}"
        if function:
            assert function in functions_of(path), f"{file} has no {function}"


@pytest.mark.parametrize("heading", walks())
def test_no_walk_visits_a_file_twice(heading: str) -> None:
    files = [file for file, _ in walks()[heading]]
    assert sorted(files) == sorted(set(files))


def test_every_file_and_folder_that_the_page_names_exists() -> None:
    named = [code for code in inline_code(PAGE) if re.fullmatch(r"(?:\.?[\w-]+/)[\w./-]*", code)]
    assert len(named) > 60
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_room_has_its_row() -> None:
    rooms = {path.parent.name for path in (ROOT / "janus_cluster").glob("*/__init__.py")}
    table = PAGE.read_text(encoding="utf-8").partition("## Where a change goes\n")[2].partition("\n## ")[0]
    assert {room for room in rooms if f"`janus_cluster/{room}/`" not in table} == set()


def test_the_functions_that_instructions_name_exist() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for function, file in re.findall(r"`(\w+)` (?:in|of)\s+`(janus_cluster/[\w/]+\.py)`", text):
        assert re.search(rf"^(?:def |class )?{function}\b", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), (
            f"{file} has no {function}"
        )
