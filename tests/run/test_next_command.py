"""A printed command names its run so that it works in a shell in any folder."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from janus_cluster.observe.find import find_run
from janus_cluster.run.files import write_json_atomically
from janus_cluster.run.next_command import command_for, known_runs_dirs, name_of, remember_runs_dir, submit_command
from janus_cluster.run.paths import RunDir


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JANUS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def make_run(folder: Path, name: str, **submission: str) -> RunDir:
    run = RunDir(folder / name)
    run.bundle(1).path.mkdir(parents=True)
    write_json_atomically(run.submission_json, {"schema_version": 1, "job_id": "4711", **submission})
    return run


@pytest.mark.parametrize(
    ("submission", "name"),
    [
        ({"cluster": "slurm"}, "4711"),
        # Numbers that another cluster, or the next sandbox, has too.
        ({"cluster": "slurm", "slurm_cluster": "beta"}, "demo-1"),
        ({"cluster": "sandbox"}, "demo-1"),
        ({"cluster": "local"}, "demo-1"),
    ],
)
def test_a_run_of_the_default_folder_has_a_short_name(home: Path, submission: dict[str, str], name: str) -> None:
    run = make_run(home / "runs", "demo-1", **submission)
    assert name_of(run) == name
    assert find_run(name, [home / "runs"]).path == run.path


def test_a_run_elsewhere_is_named_by_its_folder_until_that_is_known(home: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "a b", "demo-1", cluster="slurm")
    assert shlex.split(command_for("tail", run, "--rank 0")) == ["janus-cluster", "tail", str(run.path), "--rank", "0"]
    assert shlex.split(submit_command(run))[-1] == str(run.links.job_yaml)
    remember_runs_dir(run.path.parent)
    remember_runs_dir(run.path.parent)
    assert known_runs_dirs() == [run.path.parent]
    assert command_for("tail", run) == "janus-cluster tail 4711"
    assert find_run("4711", [home / "runs"]).path == run.path
    assert find_run("demo-1", [home / "runs"]).path == run.path


def test_a_run_of_this_folder_comes_before_one_of_another(home: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "b", "other-1", cluster="slurm")
    remember_runs_dir(tmp_path / "b")
    here = make_run(home / "runs", "demo-1", cluster="slurm")
    assert find_run("4711", [home / "runs"]).path == here.path


def test_a_damaged_line_does_not_hide_the_others(home: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        remember_runs_dir(tmp_path / name)
    known = home / "site" / "runs_dirs.jsonl"
    known.write_bytes(b'{"path": 7}\n\xff\n' + known.read_bytes() + b"[1]\n{")
    assert known_runs_dirs() == [tmp_path / "b", tmp_path / "a"]
