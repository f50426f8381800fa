"""The commands as a user types them, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_files import write_verdict

from janus_cluster.run.files import write_json_atomically
from janus_cluster.run.paths import RunDir

pytestmark = pytest.mark.slow


def make_run(home: Path, name: str, *, state: str, exit_code: int | None) -> RunDir:
    run = RunDir(home / "runs" / name)
    run.bundle(1).path.mkdir(parents=True)
    run.begin_attempt()
    run.node_log(1, "h800-01").write_text("a line of the log\n")
    write_json_atomically(run.bundle(1).resolved_json, {"job": {"name": name.split("-", maxsplit=1)[0]}})
    job = {"cluster": "local", "job_id": f"local-99999999{len(name)}"}
    write_json_atomically(run.submission_json, job | {"submitted_at": time.time() - 5})
    word = job | {"attempt": 1, "nodes": ["h800-01"], "state": state, "exit_code": exit_code, "started_at": time.time()}
    write_json_atomically(run.status_json, word | {"updated_at": time.time(), "reason": "because"})
    return run


def type_in(home: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "janus_cluster.cli", *argv],
        env=os.environ
        | {"JANUS_HOME": str(home), "COLUMNS": "200", "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Two runs that have ended, and a Slurm that gives no answer, whatever this machine has."""
    (tmp_path / "bin").mkdir()
    for name in ("squeue", "sacct", "scontrol"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "bin" / name).chmod(0o755)
    make_run(tmp_path, "demo-20261121-aaaa", state="COMPLETED", exit_code=0)
    make_run(tmp_path, "train-20261121-bbbbb", state="FAILED", exit_code=12)
    return tmp_path


def test_tail_ends_with_the_jobs_exit_code(home: Path) -> None:
    done = type_in(home, "tail", "train", "-n", "5")
    assert done.returncode == 12
    assert "h800-01 | a line of the log" in done.stdout
    assert type_in(home, "tail", "demo").returncode == 0


def test_status_json_of_one_job_is_one_object_and_nothing_else(home: Path) -> None:
    done = type_in(home, "status", "train", "--json")
    value = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert (value["state"], value["exit_code"], value["reason"]) == ("FAILED", 12, "because")


def test_status_json_of_many_jobs_is_a_list(home: Path) -> None:
    values = json.loads(type_in(home, "status", "train", "demo", "--json").stdout)
    assert [v["state"] for v in values] == ["FAILED", "COMPLETED"]


def test_status_shows_reason_once_and_next_command(home: Path) -> None:
    done = type_in(home, "status", "train")
    assert done.stdout.count("because") == 1
    assert "next: janus-cluster tail train-20261121-bbbbb --no-follow -n 100\n" in done.stdout


def test_list_shows_runs_of_the_given_folder_only(home: Path, tmp_path: Path) -> None:
    assert {v["name"] for v in json.loads(type_in(home, "list", "--json").stdout)} == {
        "demo-20261121-aaaa",
        "train-20261121-bbbbb",
    }
    other = type_in(home, "list", "--runs-dir", str(tmp_path / "other"))
    assert other.returncode == 0
    assert "no runs in" in other.stdout
    assert "COMPLETED" in type_in(home, "list").stdout


def test_a_terminal_that_is_not_utf8_gets_what_it_can_show_and_a_program_all(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(home, "导航-20261121-cccccccc", state="COMPLETED", exit_code=0)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    shown = type_in(home, "tail", "导航", "--no-follow")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "COMPLETED (exit code 0" in shown.stdout
    (found,) = json.loads(type_in(home, "list", "-n", "1", "--json").stdout)
    assert found["name"] == "导航-20261121-cccccccc", "a ? in it would name another run"


def test_a_removed_folder_is_an_error_of_two_lines(home: Path) -> None:
    environ = {k: v for k, v in os.environ.items() if k != "JANUS_HOME"} | {
        "PYTHONPATH": str(Path(__file__).parents[2])
    }
    argv = ["bash", "-c", 'mkdir gone && cd gone && rmdir ../gone && exec "$@"', "bash", sys.executable]
    argv += ["-m", "janus_cluster.cli", "list"]
    done = subprocess.run(argv, cwd=home, env=environ, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: the folder that you are in was removed\nnext:  cd to another one\n"


def test_without_a_stdout_tail_still_ends_with_the_jobs_code(home: Path) -> None:
    argv = [sys.executable, "-m", "janus_cluster.cli", "tail", "train", "--no-follow"]
    environ = os.environ | {"JANUS_HOME": str(home)}
    done = subprocess.run(
        ["bash", "-c", 'exec "$@" >&-', "bash", *argv], env=environ, capture_output=True, timeout=600, check=False
    )
    assert (done.returncode, done.stderr) == (12, b"")


def test_unknown_job_exits_22_and_shows_what_to_type(home: Path) -> None:
    for command in ("tail", "status", "cancel"):
        done = type_in(home, command, "nope")
        assert (done.returncode, done.stdout) == (22, "")
        assert "janus-cluster list" in done.stderr


def test_cancel_of_a_finished_job_is_a_usage_error(home: Path) -> None:
    done = type_in(home, "cancel", "demo")
    assert done.returncode == 2
    assert "is not running: it is COMPLETED" in done.stderr


@pytest.mark.parametrize("command", ["tail", "status", "list", "cancel"])
def test_help_shows_examples(home: Path, command: str) -> None:
    done = type_in(home, command, "--help")
    assert done.returncode == 0
    assert f"janus-cluster {command}" in done.stdout.partition("Examples:")[2]


def test_watch_and_json_together_are_refused(home: Path) -> None:
    assert type_in(home, "status", "--watch", "--json").returncode == 2


def test_commands_do_not_import_torch_and_tail_needs_no_rich(home: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['rich'] = None\n"
        "from janus_cluster.cli.main import cli\n"
        "sys.exit(cli.main(['tail', 'demo', '--no-follow'], standalone_mode=False))"
    )
    env = os.environ | {"JANUS_HOME": str(home)}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=False).returncode == 0


def break_rank(home: Path) -> RunDir:
    """A failed run on a (pretended) Slurm node, with a rank's last lines and escape sequences in its log."""
    run = make_run(home, "train-20261121-ccccc", state="FAILED", exit_code=12)
    run.rank_log(1, "h800-01", 3).write_text(
        'step 1\n\x1b]0;owned\x07Traceback (most recent call last):\n  File "/x/train.py", line 7, in step\n'
        "    loss.backward()\ntorch.OutOfMemoryError: CUDA out of memory. \x1b[2JTried to allocate 2.00 GiB\n"
    )
    return run


@pytest.mark.parametrize("command", [("status",), ("tail", "-n", "0")])
def test_status_and_tail_show_one_card_of_a_failed_run(home: Path, command: tuple[str, ...]) -> None:
    run = break_rank(home)
    done = type_in(home, command[0], str(run.path), *command[1:])
    assert "\x1b" not in done.stdout
    assert done.stdout.count("GPU memory ran out [gpu_out_of_memory]") == 1
    assert "first:      rank 3 on h800-01" in done.stdout
    assert "error:      OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB" in done.stdout
    assert 'frames:     File "/x/train.py", line 7, in step' in done.stdout
    assert "next: janus-cluster resume train-20261121-ccccc --set" in done.stdout


def test_for_programs_the_card_is_an_object(home: Path) -> None:
    run = break_rank(home)
    done = type_in(home, "status", str(run.path), "--json")
    card = json.loads(done.stdout)["card"]
    assert (card["kind"], card["rank"], card["node"]) == ("gpu_out_of_memory", 3, "h800-01")
    assert "CUDA out of memory" in card["message"]
    assert card["frames"][0] == 'File "/x/train.py", line 7, in step'
    assert card["next"][0].startswith("janus-cluster resume train-20261121-ccccc --set")
    assert json.loads(type_in(home, "list", "--json").stdout)[0]["card"] is None


def test_texts_of_a_run_cannot_steer_the_terminal(home: Path) -> None:
    run = make_run(home, "evil-20261121-ddddd", state="FAILED", exit_code=12)
    word = json.loads(run.status_json.read_text())
    evil = "\x1b]0;owned\x07 \x9b2J \u202e\nsecond line"
    write_json_atomically(run.status_json, word | {"reason": evil, "nodes": ["h800\x1b[31m"]})
    run.node_log(1, "n\x1b[31mode").write_text("x\x1b[2J\n")
    for argv in (("status", "evil"), ("tail", "evil"), ("status", "evil", "--json"), ("list",), ("list", "--json")):
        out = type_in(home, *argv).stdout
        assert not {c for c in out if c not in "\n\t" and (ord(c) < 32 or 126 < ord(c) < 160 or c == "\u202e")}, argv


def test_a_node_that_failed_the_gate_is_remembered_when_status_looks(home: Path) -> None:
    run = make_run(home, "gate-20261121-eeeee", state="FAILED", exit_code=10)
    for path in (run.submission_json, run.status_json):
        write_json_atomically(path, json.loads(path.read_text()) | {"cluster": "slurm", "job_id": "7"})
    rows = [("h800-01", "gpu.count", "PASS", "8"), ("h800-02", "gpu.count", "FAIL", "7")]
    write_verdict(run, 1, rows, created_at=time.time())
    type_in(home, "status", "gate")
    type_in(home, "status", "gate")
    values = json.loads(type_in(home, "nodes", "--json").stdout)
    assert [(v["node"], v["cluster"], v["kind"], v["reason"]) for v in values] == [
        ("h800-02", "slurm", "preflight", "gpu.count: 7")
    ]
    assert values[0]["run"] == run.name
