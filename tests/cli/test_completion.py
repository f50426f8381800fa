"""TAB: what bash gets when it asks, through click's protocol and through a real bash."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.shell_completion import BashComplete

from janus_cluster.cli.main import COMMANDS, COMPLETION_VARIABLE, cli

Complete = Callable[..., list[str]]

OLD, NEW = "demo-20260101T000000Z-aaaa", "walk-20260102T000000Z-bbbb"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with two runs, job files, and janus-cluster on PATH."""
    for name, job_id in ((OLD, "4711"), (NEW, "4712")):
        folder = tmp_path / "home" / "runs" / name
        folder.mkdir(parents=True)
        (folder / "submission.json").write_text(json.dumps({"cluster": "slurm", "job_id": job_id, "submitted_at": 1}))
    (tmp_path / "home" / "runs" / "notes").mkdir()
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "janus-cluster"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m janus_cluster.cli "$@"\n')
    program.chmod(0o755)
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    (tmp_path / "a;b.yaml").write_text("name: b\n")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "own.yaml").write_text("name: own\n")
    return tmp_path


def environ(home: Path, **more: str) -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    path = f"{home / 'bin'}:{os.environ['PATH']}"
    return {"PATH": path, "HOME": str(home), "JANUS_HOME": str(home / "home"), "PYTHONPATH": root} | more


@pytest.fixture
def complete(home: Path, monkeypatch: pytest.MonkeyPatch) -> Complete:
    """The completions of the last argument, computed in this process."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("JANUS_HOME", str(home / "home"))
    monkeypatch.setenv(COMPLETION_VARIABLE, "bash_complete")

    def ask(*words: str) -> list[str]:
        found = BashComplete(cli, {}, "janus-cluster", COMPLETION_VARIABLE).get_completions(list(words[:-1]), words[-1])
        return [item.value for item in found]

    return ask


def complete_in_a_process(home: Path, *words: str) -> list[str]:
    asked = {COMPLETION_VARIABLE: "bash_complete", "COMP_CWORD": str(len(words))}
    done = subprocess.run(
        ["janus-cluster"], cwd=home, capture_output=True, text=True, timeout=600, check=False,
        env=environ(home, COMP_WORDS=" ".join(["janus-cluster", *words]), **asked),
    )  # fmt: skip
    assert done.stderr == ""
    return [line.partition(",")[2] for line in done.stdout.splitlines() if line]


def test_ctrl_c_while_a_word_is_completed_leaves_no_traceback(home: Path, tmp_path: Path) -> None:
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import os, signal, click.shell_completion as c\n"
        "c.ShellComplete.get_completions = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
    )
    done = subprocess.run(
        ["janus-cluster"], cwd=home, capture_output=True, text=True, timeout=60, check=False,
        env=environ(home, COMP_WORDS="janus-cluster st", COMP_CWORD="1", PYTHONPATH=str(hook),
                    **{COMPLETION_VARIABLE: "bash_complete"}),
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_commands_are_completed_without_importing_them(home: Path, complete: Complete) -> None:
    assert complete("") == list(COMMANDS)
    assert complete("st") == ["status"]


@pytest.mark.parametrize("command", ["tail", "status", "cancel", "resume", "eval", "export"])
def test_runs_are_completed_by_job_id_and_name(home: Path, complete: Complete, command: str) -> None:
    assert set(complete(command, "47")) == {"4711", "4712"}
    assert set(complete(command, "d")) == {"demo", OLD}


def test_folders_that_are_no_runs_are_not_offered(home: Path, complete: Complete) -> None:
    assert complete("tail", "n") == []


def test_runs_of_another_folder_are_completed(home: Path, complete: Complete) -> None:
    shutil.copytree(home / "home" / "runs" / OLD, home / "other" / "team-20260103T000000Z-cccc")
    assert "team" in complete("tail", "--runs-dir", "other", "te")
    assert complete("tail", "te") == []


def test_a_second_job_of_status_is_completed(home: Path, complete: Complete) -> None:
    assert complete("status", "4711", "wa") == [NEW, "walk"]


@pytest.mark.parametrize("command", ["submit", "preflight", "render", "plan"])
def test_job_files_are_completed(home: Path, complete: Complete, command: str) -> None:
    assert complete(command, "") == [
        "demo", "preflight", "train_1node", "train_2node", "mine.yaml", "jobs/own.yaml",
    ]  # fmt: skip
    assert complete(command, "jobs/o") == ["jobs/own.yaml"]


def test_job_files_of_subcommands_are_completed(home: Path, complete: Complete) -> None:
    assert complete("config", "show", "mi") == ["mine.yaml"]


def test_a_path_that_is_no_job_file_is_left_to_the_shell(home: Path, complete: Complete) -> None:
    assert complete("submit", "somewhere/") == ["somewhere/"]


def test_a_broken_run_does_not_break_completion(home: Path, complete: Complete) -> None:
    (home / "home" / "runs" / NEW / "submission.json").write_text("{")
    assert "4711" in complete("tail", "")


def test_a_thousand_runs_do_not_slow_it_down(home: Path) -> None:
    for i in range(1000):
        folder = home / "home" / "runs" / f"many-20260104T{i:06}Z-dddd"
        folder.mkdir()
        (folder / "submission.json").write_text(json.dumps({"cluster": "slurm", "job_id": str(i), "submitted_at": 1}))
    before = children_cpu_s()
    subprocess.run(["janus-cluster", "--version"], env=environ(home), check=True, capture_output=True)
    bare_s = children_cpu_s() - before
    assert "many" in complete_in_a_process(home, "tail", "ma")
    assert children_cpu_s() - before < 4 * bare_s


def children_cpu_s() -> float:
    """What processes that have ended took of the processors, which other load does not change."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_bash_itself_completes_with_the_script_it_evaluates(home: Path) -> None:
    script = """
        eval "$(_JANUS_CLUSTER_COMPLETE=bash_source janus-cluster)"
        COMP_WORDS=(janus-cluster cancel 47) COMP_CWORD=2
        function_name=$(complete -p janus-cluster | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        "$function_name" janus-cluster 47 cancel
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", script], cwd=home, env=environ(home), capture_output=True, text=True, check=False
    )
    assert sorted(done.stdout.split()) == ["4711", "4712"], done.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_script(home: Path, shell: str) -> None:
    done = subprocess.run(
        ["janus-cluster"], env=environ(home, _JANUS_CLUSTER_COMPLETE=f"{shell}_source"),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "_JANUS_CLUSTER_COMPLETE" in done.stdout
