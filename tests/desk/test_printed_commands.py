"""Every command that a card, a table or the end of a command prints works as printed, in a shell in another folder.

The Slurm programs are scripts on PATH. What an evaluation and a report need (weights, figures) these runs do not have:
of those commands the options are parsed and the run is found, as the command itself does first.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import click
import pytest
from fake_site import Site
from run_files import write_verdict

from janus_cluster.cli.main import cli
from janus_cluster.errors import FailureKind
from janus_cluster.observe.find import find_run
from janus_cluster.run.files import read_json, write_json_atomically
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.attempt import AttemptRecord
from janus_cluster.run.records.failure import FailureRecord

pytestmark = pytest.mark.slow

COMMAND = re.compile(r"(?:^|[\s(])(janus-cluster [a-z].*?)(?:\s{2,}#.*|;.*|, docs/.*)?$", re.MULTILINE)
ONLY_PARSED = frozenset({"eval", "report", "sandbox"})
# Their value is the user's to fill in: weights, lines of a shell.
TO_FILL_IN = {"model.path=…": "model.path=", "model.vggt_path=…": "model.vggt_path=", "[…]": "[]"}
MESSAGES = {
    "loader": ("AF_UNIX path too long", "no space left in shared memory", "worker 7 is killed by signal: Killed", "?"),
    "environment": ("environment.setup: line 1 failed", "environment.setup_each_node: line 1 failed", "?"),
    "bad_data": ("demo_data: no episodes", "truncated"),
}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path)
    program = tmp_path / "bin" / "janus-cluster"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m janus_cluster.cli "$@"\n')
    program.chmod(0o755)
    return site


@pytest.fixture(params=["default folder", "runs in another folder"])
def run(request: pytest.FixtureRequest, site: Site) -> RunDir:
    """A run that was sent to Slurm as job 4711."""
    site.script("sbatch", "echo Submitted batch job 4711")
    elsewhere = [] if request.param == "default folder" else ["--set", f"runs_dir={site.folder}/my runs"]
    done = site.janus("submit", "demo", "--json", *elsewhere)
    assert done.returncode == 0, done.stderr
    return RunDir(Path(json.loads(done.stdout)["run_dir"]))


def end(run: RunDir, state: str, *, failure: FailureRecord | None = None, code: int = 12) -> None:
    """The attempt has ended so."""
    if not run.attempts():
        run.begin_attempt()
    code = 0 if state == "COMPLETED" else code
    AttemptRecord(
        attempt=1, job_id="4711", nodes=("n1", "n2"), from_step=0, started_at=1.0, ended_at=2.0, state=state,
        exit_code=code, failure=failure, bundle=1,
    ).write(run.attempt_json(1))  # fmt: skip
    word = {"cluster": "slurm", "job_id": "4711", "attempt": 1, "nodes": ["n1", "n2"], "state": state}
    times = {"started_at": time.time() - 60, "updated_at": time.time() - 30}
    write_json_atomically(run.status_json, word | times | {"exit_code": code, "reason": "because"})
    # As sent, before a command of this test sent it again.
    sent = read_json(run.submission_json) | {"job_id": "4711", "submitted_at": time.time() - 90, "history": []}
    write_json_atomically(run.submission_json, sent)


def commands_in(text: str) -> list[str]:
    return list(dict.fromkeys(found.strip().rstrip(".`") for found in COMMAND.findall(text)))


def parse(words: Sequence[str]) -> click.Context:
    """The command's own parser takes the words. Raises: click.UsageError."""
    context = cli.make_context("janus-cluster", list(words))
    while isinstance(group := context.command, click.Group):
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        assert name is not None and command is not None
        context = command.make_context(name, rest, parent=context)
    return context


def type_it(site: Site, command: str, folder: Path) -> None:
    """The command works, in a shell of that folder. A pipe keeps it from asking."""
    for blank, value in TO_FILL_IN.items():
        command = command.replace(blank, value)
    assert "…" not in command, command
    words = shlex.split(command)
    if words[1] in ONLY_PARSED:
        context = parse(words[1:])
        named = context.params.get("target") or (context.params.get("runs") or ("",))[0]
        if named:
            assert find_run(str(named), [site.folder / "home" / "runs"]), command
        return
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=site.environ | {"HOME": str(folder)}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    # tail and status end with the run's own code.
    allowed = {0, 12, 13, 10, 11} if words[1] in ("tail", "status") else {0}
    assert done.returncode in allowed and "Traceback" not in done.stderr, f"{command}\n{done.stdout}{done.stderr}"


@pytest.fixture
def other_folder(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the commands are typed; what a run's own files name is there as the run's user has it."""
    for name, value in site.environ.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "somewhere else"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == [], "a command wrote into the folder where it was typed"


def failures() -> Iterator[FailureRecord]:
    for kind in get_args(FailureKind):
        for message in MESSAGES.get(kind, ("it ended",)):
            yield FailureRecord(kind=kind, rank=1, node="n2", message=message)


def test_every_command_of_every_card_works(site: Site, run: RunDir, other_folder: Path) -> None:
    typed: dict[str, str] = {}
    for failure in failures():
        end(run, "FAILED", failure=failure)
        shown = site.janus("status", run.name).stdout
        found = commands_in(shown)
        assert found or failure.kind in ("preflight", "preflight_undetermined"), f"{failure.kind}: no command\n{shown}"
        typed |= {command: failure.kind for command in found if command not in typed}
    assert len(typed) > 10
    for command, kind in typed.items():
        end(run, "FAILED", failure=FailureRecord(kind=kind, rank=1, node="n2", message="it ended"))
        type_it(site, command, other_folder)


@pytest.mark.parametrize("state", ["COMPLETED", "STOPPED", "CANCELLED", "PREEMPTED"])
def test_every_command_of_an_ended_run_works(site: Site, run: RunDir, other_folder: Path, state: str) -> None:
    end(run, state)
    found = commands_in(site.janus("status", run.name).stdout)
    assert found
    for command in found:
        end(run, state)
        type_it(site, command, other_folder)


def test_every_command_of_a_failed_gate_works(site: Site, run: RunDir, other_folder: Path) -> None:
    failure = FailureRecord(kind="preflight", message="hca.rails on n2")
    end(run, "FAILED", failure=failure, code=10)
    write_verdict(run, 1, [("n2", "hca.rails", "FAIL", "7 of 8")], nodes=("n1", "n2"))
    found = commands_in(site.janus("status", run.name).stdout)
    assert any("slurm.exclude=n2" in command for command in found)
    for command in found:
        end(run, "FAILED", failure=failure, code=10)
        type_it(site, command, other_folder)


def test_every_command_of_a_submission_works(site: Site, other_folder: Path) -> None:
    site.script("sbatch", "echo Submitted batch job 4711")
    for argv in (["submit", "demo"], ["submit", "demo", "--dry-run"]):
        done = site.janus(*argv)
        assert done.returncode == 0, done.stderr
        for command in commands_in(done.stdout):
            if " tail " not in command and " cancel " not in command:
                type_it(site, command, other_folder)
