"""--json: every command whose output a program may want has it; stdout is then one JSON document and nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from janus_cluster.cli.main import COMMANDS, cli
from janus_cluster.errors import JanusError
from janus_cluster.run.files import write_json_atomically
from janus_cluster.run.paths import RunDir
from tests.tiny_data import write_tiny_data

# Commands without --json, each with its reason.
WITHOUT_JSON = {
    "tail": "its output is the job's log, line by line; status --json shows how the job ended",
    "render": "its output is a file as it would be written; --part ds is JSON already",
    "config schema": "its output is JSON already, or the page that --markdown asks for",
}
NAME = "demo-20261121-aaaa"
OTHER = "demo-20261121-bbbb"
# What is typed, and a key of the object that comes (None: a list). A command that is missing here is in RUN_ELSEWHERE.
TYPED: dict[str, tuple[list[str], str | None]] = {
    "init": (["init"], "unknown"),
    "submit": (["submit", "demo", "--dry-run"], "run_dir"),
    "preflight": (["preflight", "--lint-env"], "warnings"),
    "status": (["status", NAME], "plan_step_time_s"),
    "compare": (["compare", NAME, OTHER], "differences"),
    "list": (["list"], None),
    "nodes": (["nodes"], None),
    "nodes add": (["nodes", "add", "h1", "--reason", "fan"], "reason"),
    "nodes forgive": (["nodes", "forgive", "--all"], "forgiven"),
    "plan": (["plan"], "options"),
    "config show": (["config", "show", "demo"], "training.seed"),
    "config check": (["config", "check", "demo"], "weights"),
    "demo-data": (["demo-data", "walks", "--episodes", "1", "--size", "64x64"], "written"),
    "sandbox down": (["sandbox", "down"], "was_there"),
    "sandbox status": (["sandbox", "status"], "state"),
}
RUN_ELSEWHERE = {
    "eval": "tests/training/test_evaluation.py",
    "export": "tests/training/test_published.py",
    "simulate": "tests/training/test_simulation.py",
    "verify-core": "tests/janusvln/test_verify.py",
    "report": "tests/report/test_report_cli.py",
    "cancel": "tests/desk/test_resume.py",
    "resume": "tests/desk/test_resume.py",
    "data index": "tests/cli/test_data_command.py",
    "sandbox up": "tests/sandbox/test_sandbox_live.py",
    "sandbox heal": "tests/sandbox/test_sandbox_live.py",
    "sandbox fault cut-link": "tests/sandbox/test_sandbox_live.py",
    "sandbox fault slow-link": "tests/sandbox/test_sandbox_live.py",
    "sandbox fault hide-path": "tests/sandbox/test_sandbox_live.py",
    "sandbox fault stop-slurmd": "tests/sandbox/test_sandbox_live.py",
}


def leaves() -> Iterator[tuple[str, click.Command]]:
    """Every command that can be run: all but the groups that only hold others."""
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        yield from _leaves(name, command)


def _leaves(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group) or command.invoke_without_command:
        yield name, command
    if isinstance(command, click.Group):
        for word, child in command.commands.items():
            yield from _leaves(f"{name} {word}", child)


def test_every_command_has_json_or_a_reason_not_to() -> None:
    has = {name: any("--json" in p.opts for p in command.params) for name, command in leaves()}
    assert {name for name, known in has.items() if not known} == set(WITHOUT_JSON)
    assert {name for name, known in has.items() if known} == set(TYPED) | set(RUN_ELSEWHERE)


def test_the_tests_that_stand_for_a_command_type_json() -> None:
    root = Path(__file__).parents[2]
    for name, path in RUN_ELSEWHERE.items():
        assert "--json" in (root / path).read_text(encoding="utf-8"), f"{name}: {path}"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with data and two finished runs; JANUS_HOME inside it."""
    write_tiny_data(tmp_path / "demo_data")
    for number, name in enumerate((NAME, OTHER)):
        run = RunDir(tmp_path / "home" / "runs" / name)
        run.bundle(1).path.mkdir(parents=True)
        run.begin_attempt()
        job = {"cluster": "local", "job_id": f"local-99999999{number}"}
        write_json_atomically(run.bundle(1).resolved_json, {"job": {"name": "demo", "nodes": 1}, "origins": {}})
        write_json_atomically(run.submission_json, job | {"submitted_at": time.time() - 5})
        word = job | {"attempt": 1, "nodes": ["h1"], "state": "COMPLETED", "exit_code": 0, "started_at": time.time()}
        write_json_atomically(run.status_json, word | {"updated_at": time.time()})
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def type_in(home: Path, *argv: str) -> Result:
    return CliRunner(env={"JANUS_HOME": str(home), "COLUMNS": "80"}).invoke(cli, argv)


@pytest.mark.parametrize("name", TYPED)
def test_stdout_is_one_json_document_and_nothing_else(home: Path, name: str) -> None:
    argv, key = TYPED[name]
    done = type_in(home, *argv, "--json")
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    value: Any = json.loads(done.stdout)
    assert isinstance(value, list) if key is None else key in value


WRONG = [
    (["submit", "nowhere.yaml"], 2),
    (["submit", "demo", "--set", "training.seed=x", "--dry-run"], 2),
    (["status", "nope"], 22),
    (["cancel", "nope"], 22),
    (["resume", "nope"], 22),
    (["report", "nope"], 22),
    (["compare", "nope", NAME], 22),
    (["eval", "nope"], 22),
    (["simulate", "nope"], 22),
    (["export", "nope"], 22),
    (["cancel", NAME], 2),
    (["plan", "--nodes", "3"], 2),
    (["config", "show", "nowhere.yaml"], 2),
    (["config", "check", "demo", "--set", "model.path=/no/such/model"], 2),
    (["nodes", "forgive", "h7"], 2),
]


@pytest.mark.parametrize(("argv", "code"), WRONG, ids=[" ".join(argv) for argv, _ in WRONG])
def test_an_error_leaves_stdout_empty_and_has_its_exit_code(home: Path, argv: list[str], code: int) -> None:
    done = type_in(home, *argv, "--json")
    assert done.stdout == ""
    # The process prints it on stderr; here it arrives as it was raised.
    assert isinstance(done.exception, (JanusError, SystemExit))
    assert (done.exception.exit_code if isinstance(done.exception, JanusError) else done.exit_code) == code
