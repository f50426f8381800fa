"""The commands, keys and links of the documents exist, and what can run here runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import click
import pytest
from pages import NEEDS, PAGES, READMES, ROOT, Block, blocks, inline_code, links, our_commands, table_commands
from weight_files import write_qwen, write_vggt

from janus_cluster.cli.main import cli
from janus_cluster.job.profiles import load_preflight_profile
from janus_cluster.job.reference import COMMAND, render_reference
from janus_cluster.job.schema import JobConfig
from tests.tiny_data import write_tiny_data

SECTIONS = "hardware|environment|preflight|model|data|training|deepspeed|checkpoint|restart"
KEY = re.compile(rf"^(?:--set )?((?:{SECTIONS})(?:\.[a-z_0-9]+)+)(?:[:=].*)?$")
FREE = ("slurm.", "environment.variables.", "deepspeed.overrides.")
FILE_ENDINGS = (".md", ".pt", ".py", ".yaml", ".yml", ".json", ".safetensors")
PLACEHOLDERS = ("…", "a.b", "KEY")

page_names = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def schema_keys() -> set[str]:
    schema = JobConfig.model_json_schema()

    def walk(section: dict[str, Any], prefix: str) -> set[str]:
        keys = set()
        for key, value in section["properties"].items():
            keys.add(prefix + key)
            if "$ref" in value:
                keys |= walk(schema["$defs"][value["$ref"].rpartition("/")[2]], f"{prefix}{key}.")
        return keys

    return walk(schema, "")


def is_key(key: str, keys: set[str]) -> bool:
    return key in keys or key.startswith(FREE) or is_threshold(key)


def is_threshold(key: str) -> bool:
    """The key is preflight.thresholds with a path that a shipped profile has."""
    value: object = load_preflight_profile("h800-ib")
    for name in key.removeprefix("preflight.thresholds.").split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return key.startswith("preflight.thresholds.") and value is not None


def parse(words: list[str], keys: set[str]) -> None:
    """The words name a command, its options, and values that they allow. Raises: click.UsageError, AssertionError."""
    command: click.Command = cli
    ctx = click.Context(cli, info_name="janus-cluster")
    while True:
        if not words and not isinstance(command, click.Group):
            return
        opts, rest, _ = command.make_parser(ctx).parse_args(list(words))
        for param in command.params:
            given = opts.get(param.name or "")
            values = given if isinstance(given, list) else [given]
            for value in values:
                if isinstance(param.type, click.Choice) and isinstance(value, str) and value not in PLACEHOLDERS:
                    assert value in param.type.choices, f"{param.opts[-1]} {value}: not one of {param.type.choices}"
                if param.name == "sets" and isinstance(value, str) and not value.startswith(PLACEHOLDERS):
                    assert is_key(value.partition("=")[0], keys), f"--set {value}: no such key"
        if not isinstance(command, click.Group) or not rest:
            assert isinstance(command, click.Group) or not rest, f"too much: {rest}"
            return
        name, words = rest[0], rest[1:]
        if name.startswith("…") or name == "COMMAND":
            return
        child = command.get_command(ctx, name)
        assert child is not None, f"no command {name!r}"
        command, ctx = child, click.Context(child, info_name=name, parent=ctx)


@page_names
def test_every_command_that_a_page_names_exists_with_its_options(page: Path) -> None:
    keys = schema_keys()
    wrong = []
    for written, words in our_commands(page):
        try:
            parse(words, keys)
        except (click.UsageError, AssertionError) as e:
            wrong.append(f"{written!r}: {e.format_message() if isinstance(e, click.UsageError) else e}")
    assert not wrong, "\n".join(wrong)


def test_commands_are_found_where_they_are_written() -> None:
    found = {tuple(words) for _, words in our_commands(READMES[0])}
    assert ("nodes", "forgive", "NODE") in found
    assert ("nodes", "add", "NODE", "--reason", "…") in found
    assert ("submit", "--nodes", "2", "--dry-run") in found
    assert ("sandbox", "fault") in found


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["submitt"], "no command"),
        (["submit", "--nods", "2"], "No such option"),
        (["submit", "--set", "training.lerning_rate=1"], "no such key"),
        (["submit", "a.yaml", "b.yaml"], "too much"),
        (["submit", "--cluster", "lokal"], "not one of"),
        (["sandbox", "fault", "melt"], "no command"),
    ],
)
def test_a_command_that_does_not_exist_is_found(words: list[str], error: str) -> None:
    with pytest.raises((click.UsageError, AssertionError), match=error):
        parse(words, schema_keys())


@page_names
def test_every_key_that_a_page_names_exists(page: Path) -> None:
    keys = schema_keys()
    named = [match[1] for code in inline_code(page) if (match := KEY.match(code)) and not code.endswith(FILE_ENDINGS)]
    assert [key for key in named if not is_key(key, keys)] == []


@page_names
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    broken = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in _anchors(target)):
            broken.append(link)
    assert broken == []


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {"".join(c for c in h.lower().replace(" ", "-") if c.isalnum() or c in "-_") for h in headings}


def _exists(module: str) -> bool:
    """Of this checkout, or a package of others that is installed.

    Not `importlib.util.find_spec`: it asks setuptools' own finder, which on being asked for pip
    gives this process Python's deprecated distutils, for good.
    """
    path = ROOT / module.replace(".", "/")
    if path.exists() or path.with_suffix(".py").exists():
        return True
    top, _, rest = module.partition(".")
    return not rest and PathFinder.find_spec(top) is not None


@page_names
def test_modules_and_make_targets_that_a_page_names_exist(page: Path) -> None:
    text = "\n".join([*(b.text for b in blocks(page)), *inline_code(page)])
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert _exists(module), module
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for target in re.findall(r"^make ([a-z-]+)", text, re.MULTILINE):
        assert target in targets, f"make {target}"


@page_names
def test_a_bash_block_that_is_not_run_shows_what_it_needs(page: Path) -> None:
    for block in blocks(page):
        if block.language == "bash" and block.needs is not None:
            assert block.needs in NEEDS, f"{block.place}: <!-- needs: {block.needs} -->; known: {', '.join(NEEDS)}"


RUNNABLE = [b for page in PAGES for b in blocks(page) if b.language == "bash" and b.needs is None]


@pytest.mark.slow
@pytest.mark.parametrize("block", RUNNABLE, ids=lambda block: block.place)
def test_a_bash_block_without_a_marker_runs(block: Block, tmp_path: Path) -> None:
    """In an empty folder with demo data and a job file of one's own, with no Slurm and no GPU."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "janus-cluster").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m janus_cluster.cli "$@"\n')
    (tmp_path / "bin" / "janus-cluster").chmod(0o755)
    (tmp_path / "docs").mkdir()
    write_tiny_data(tmp_path / "demo_data")
    shutil.copy(ROOT / "jobs" / "train_2node.yaml", tmp_path / "my.yaml")
    environ = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "JANUS_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(ROOT),
        "DATA_ROOT": str(tmp_path / "demo_data"),
    }
    if "submit" in block.text:
        # The page has the reader export them; only `plan` needs neither.
        environ |= {
            "MODEL_PATH": str(write_qwen(tmp_path / "model")),
            "VGGT_MODEL_PATH": str(write_vggt(tmp_path / "VGGT-1B")),
        }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{block.place}\n{block.text}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def test_the_old_cache_files_are_removed_and_nothing_else_is(tmp_path: Path) -> None:
    (block,) = [b for b in RUNNABLE if "vggt_cache" in b.text]
    for name in ("a/step_0001_STOP.vggt_cache.pt", "a/step_0001_STOP.png", "a/model.pt", "b/x.vggt_cache.pt.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x" * 10)
    environ = {"PATH": os.environ["PATH"], "DATA_ROOT": str(tmp_path)}
    done = subprocess.run(["bash", "-euc", block.text], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("1 files, 0.0 GB\n")
    left = sorted(p.name for p in tmp_path.rglob("*") if p.is_file())
    assert left == ["model.pt", "step_0001_STOP.png", "x.vggt_cache.pt.txt"]


def test_some_blocks_are_run() -> None:
    assert len(RUNNABLE) >= 4, [b.place for b in RUNNABLE]


def test_both_readmes_hold_the_same_commands() -> None:
    english, chinese = READMES
    assert [(b.language, b.needs, _code_only(b.text)) for b in blocks(chinese) if b.language == "bash"] == [
        (b.language, b.needs, _code_only(b.text)) for b in blocks(english) if b.language == "bash"
    ]
    assert len(blocks(chinese)) == len(blocks(english))
    assert table_commands(chinese) == table_commands(english)


def test_both_readmes_name_the_same_files_in_their_maps() -> None:
    english, chinese = (
        [
            sorted(re.findall(r"[A-Za-z0-9_<>.-]+(?:/|\.(?:py|json|jsonl|sh|sbatch|yaml|log|md))", b.text))
            for b in blocks(page)
        ]
        for page in READMES
    )
    assert english == chinese


def test_both_readmes_hold_the_same_sections_and_link_to_each_other() -> None:
    levels = [re.findall(r"^(#+) ", page.read_text(encoding="utf-8"), re.MULTILINE) for page in READMES]
    assert levels[0] == levels[1]
    assert READMES[1].name in links(READMES[0])
    assert READMES[0].name in links(READMES[1])


def _code_only(text: str) -> str:
    """Commands without their comments, which are in the reader's language."""
    return "\n".join(re.sub(r"(^|\s+)#\s.*", "", line).rstrip() for line in text.splitlines())


def test_the_configuration_reference_is_the_one_that_is_generated() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == render_reference(JobConfig.model_json_schema()), f"docs/configuration.md is old; type: {COMMAND}"


def test_every_key_has_a_description() -> None:
    schema = JobConfig.model_json_schema()
    silent = [
        f"{name}.{key}"
        for name, section in {"job": schema, **schema["$defs"]}.items()
        for key, value in section["properties"].items()
        if "$ref" not in value and not value.get("description")
    ]
    assert silent == []


def test_the_reference_holds_every_key_with_its_default() -> None:
    page = render_reference(JobConfig.model_json_schema())
    for key in schema_keys():
        assert f"| `{key.rpartition('.')[2]}` |" in page, key
    assert "| `learning_rate` | number | `2e-5` | > 0, ≤ 1 |" in page
    assert json.dumps(["q_proj", "k_proj", "v_proj", "o_proj"]) in page
