"""`--help` of every command and subcommand: what a manual page would have, and nothing that does not exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from pages import PAGES, READMES, ROOT
from test_docs import parse, schema_keys

from janus_cluster import errors
from janus_cluster.cli.main import COMMANDS, cli
from janus_cluster.errors import EXIT_CODES, PREFLIGHT_EXIT_CODES, JanusError
from janus_cluster.run.records.verdict import EXIT_CODES as GATE_EXIT_CODES

WIDEST = 100


def walk(command: click.Command, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield words, command
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from walk(child, (*words, name))


def every_command() -> list[tuple[tuple[str, ...], click.Command]]:
    found = []
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        found += walk(command, (name,))
    return found


ALL = every_command()
commands = pytest.mark.parametrize(("words", "command"), ALL, ids=[" ".join(words) for words, _ in ALL])


def help_of(words: tuple[str, ...], *, columns: int = 200) -> str:
    done = CliRunner(env={"COLUMNS": str(columns)}).invoke(cli, [*words, "--help"], prog_name="janus-cluster")
    assert done.exit_code == 0, done.output
    return done.stdout


def examples_of(text: str) -> list[str]:
    block = re.search(r"^ *Examples:\n((?: +\S.*\n)+)", text, re.MULTILINE)
    return [line.strip() for line in block[1].splitlines()] if block else []


def typed(example: str) -> list[str]:
    """The arguments of an example's `janus-cluster`, without its comment."""
    line = re.split(r" {2,}| > ", example)[0]
    return shlex.split(line.partition("janus-cluster ")[2])


@commands
def test_help_has_a_summary_two_examples_and_a_page_to_read_on(words: tuple[str, ...], command: click.Command) -> None:
    text = help_of(words)
    summary = (command.help or "").split("\n\n", maxsplit=1)[0]
    assert summary.strip().endswith((".", ".)"))
    assert len(examples_of(text)) >= 2
    pages = re.search(r"See also: (.+)$", text, re.MULTILINE)
    assert pages is not None
    assert [page for page in pages[1].split(", ") if not (ROOT / page).is_file()] == []


@commands
def test_every_example_parses(words: tuple[str, ...], command: click.Command) -> None:
    keys = schema_keys()
    for example in examples_of(help_of(words)):
        assert "janus-cluster " in example
        try:
            parse(typed(example), keys)
        except click.UsageError as e:
            pytest.fail(f"{example}: {e.format_message()}")


@commands
def test_one_of_the_examples_is_of_the_command_itself(words: tuple[str, ...], command: click.Command) -> None:
    examples = [typed(example) for example in examples_of(help_of(words))]
    assert any(tuple(e[: len(words)]) == words for e in examples)


@commands
def test_every_option_is_explained_with_its_default(words: tuple[str, ...], command: click.Command) -> None:
    for param in command.params:
        if not isinstance(param, click.Option):
            continue
        assert param.help, f"{param.opts[-1]} has no help"
        # Options without a value have their default in the help text, or need none.
        if not param.is_flag and not param.multiple and not param.required and isinstance(param.default, (str, int)):
            assert param.show_default, f"{param.opts[-1]} hides its default {param.default!r}"


@pytest.mark.parametrize("words", [(), *(words for words, _ in ALL)], ids=" ".join)
def test_no_line_is_wider_than_a_page(words: tuple[str, ...]) -> None:
    text = help_of(words)
    assert [line for line in text.splitlines() if len(line) > WIDEST] == []
    # click knows \b, which keeps lines as they are, only at the beginning of a paragraph.
    assert [c for c in text if ord(c) < 32 and c != "\n"] == []


def test_the_parser_of_examples_finds_what_is_wrong() -> None:
    with pytest.raises(click.UsageError):
        parse(typed("janus-cluster status --wach    again and again"), schema_keys())
    assert typed("watch -n1 janus-cluster status 7    often") == ["status", "7"]
    assert typed("janus-cluster config schema > x.json") == ["config", "schema"]


def test_the_table_of_exit_codes_is_that_of_the_exceptions() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, JanusError)]
    assert {c.exit_code for c in classes} | {0, 130, 141} == set(EXIT_CODES)
    assert dict(zip(("pass", "warn", "fail", "undetermined"), PREFLIGHT_EXIT_CODES, strict=True)) == {
        meaning: code for code, meaning in PREFLIGHT_EXIT_CODES.items()
    }
    assert set(GATE_EXIT_CODES.values()) == set(PREFLIGHT_EXIT_CODES)


def rows(page: Path) -> dict[int, str]:
    found = re.findall(r"^\| (\d+) \| (.+?) \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {int(code): meaning for code, meaning in found}


def test_help_and_both_readmes_show_the_same_exit_codes() -> None:
    shown = re.findall(r"^ +(\d+) {1,}(\S.*)$", help_of(()).partition("Exit codes:\n")[2], re.MULTILINE)
    assert {int(code): meaning for code, meaning in shown} == EXIT_CODES
    assert rows(READMES[0]) == EXIT_CODES
    assert list(rows(READMES[1])) == list(EXIT_CODES)


def test_no_page_names_an_exit_code_that_does_not_exist() -> None:
    named = {
        (page.name, int(code))
        for page in PAGES
        for match in re.findall(r"exit codes? (\d+(?:(?:, | or | and )\d+)*)", page.read_text(encoding="utf-8"))
        for code in re.findall(r"\d+", match)
    }
    assert named
    assert {(page, code) for page, code in named if code not in EXIT_CODES} == set()
