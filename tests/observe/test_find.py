from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from janus_cluster.errors import JobNotFound
from janus_cluster.observe.find import find_run, job_name, list_runs
from janus_cluster.run.files import write_json_atomically
from janus_cluster.run.paths import RunDir


def make_run(folder: Path, name: str, *, job: str, job_id: str | None, age_s: float, kind: str = "train") -> RunDir:
    run = RunDir(folder / name)
    run.bundle(1).path.mkdir(parents=True)
    write_json_atomically(run.bundle(1).resolved_json, {"job": {"name": job, "kind": kind}})
    made = time.time() - age_s
    os.utime(run.bundle(1).resolved_json, (made, made))
    if job_id:
        write_json_atomically(
            run.submission_json, {"cluster": "slurm", "job_id": job_id, "submitted_at": made, "slurm_conf": None}
        )
    return run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    make_run(folder, "demo-20261120-aaaa", job="demo", job_id="7", age_s=300)
    make_run(folder, "demo-20261121-bbbb", job="demo", job_id="12", age_s=200)
    make_run(folder, "demo-big-20261121-cccc", job="demo-big", job_id="7", age_s=100)
    make_run(folder, "train_2node-20261121-dddd", job="train_2node", job_id=None, age_s=50)
    (folder / "no-run").mkdir()
    return folder


@pytest.mark.parametrize(
    ("ref", "name"),
    [
        ("12", "demo-20261121-bbbb"),
        ("7", "demo-big-20261121-cccc"),
        ("demo", "demo-20261121-bbbb"),
        ("demo-20261120-aaaa", "demo-20261120-aaaa"),
        ("demo-20261120", "demo-20261120-aaaa"),
        ("train", "train_2node-20261121-dddd"),
    ],
)
def test_run_is_found_by_id_name_job_or_beginning(runs: Path, ref: str, name: str) -> None:
    assert find_run(ref, [runs]).name == name


def test_run_is_found_by_path_from_anywhere(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_run(str(runs / "demo-20261120-aaaa"), []).name == "demo-20261120-aaaa"
    monkeypatch.chdir(runs / "demo-20261120-aaaa")
    assert find_run(".", []).path == (runs / "demo-20261120-aaaa").resolve()


def test_beginning_of_several_runs_names_them(runs: Path) -> None:
    with pytest.raises(JobNotFound, match="demo-20261120-aaaa") as caught:
        find_run("demo-", [runs])
    assert "demo-big-20261121-cccc" in caught.value.message


def test_unknown_name_shows_the_nearest_and_what_to_type(runs: Path) -> None:
    with pytest.raises(JobNotFound, match="did you mean train_2node") as caught:
        find_run("trian_2node", [runs])
    assert "janus-cluster list" in (caught.value.hint or "")
    assert caught.value.exit_code == 22


@pytest.mark.parametrize("ref", ["no-run", "", "99", "../runs", "a\0b"])
def test_what_is_no_run_is_not_found(runs: Path, ref: str) -> None:
    with pytest.raises(JobNotFound):
        find_run(ref, [runs])


def test_a_run_of_another_user_is_not_called_absent(runs: Path) -> None:
    (runs / "theirs-1").mkdir(mode=0o700)
    code = (
        "import sys; from pathlib import Path; from janus_cluster.observe.find import find_run; "
        "find_run('theirs-1', [Path(sys.argv[1])])"
    )
    (runs / "theirs-1").chmod(0)
    # root may read everything, unless it gives that up.
    unprivileged = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    argv = [*unprivileged, sys.executable, "-c", code, str(runs)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    (runs / "theirs-1").chmod(0o700)
    assert "theirs-1: you may not read it" in done.stderr


def test_empty_folder_shows_that_there_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(JobNotFound, match="there are no runs in"):
        find_run("demo", [tmp_path / "missing"])


def test_runs_are_listed_newest_first_and_once(runs: Path) -> None:
    names = [run.name for run in list_runs([runs, runs])]
    assert names == [
        "train_2node-20261121-dddd",
        "demo-big-20261121-cccc",
        "demo-20261121-bbbb",
        "demo-20261120-aaaa",
    ]


def test_job_name_comes_from_the_folder_when_resolved_json_is_gone(runs: Path) -> None:
    run = RunDir(runs / "demo-big-20261121-cccc")
    run.bundle(1).resolved_json.unlink()
    assert job_name(run) == "demo-big"


def test_a_job_name_means_the_run_that_trains_not_the_gate_alone_after_it(runs: Path) -> None:
    gate = make_run(runs, "demo-20261122-eeee", job="demo", job_id="30", age_s=10, kind="preflight")
    assert find_run("demo", [runs]).name == "demo-20261121-bbbb"
    assert find_run("30", [runs]) == find_run(gate.name, [runs]) == gate
    alone = make_run(runs, "gate-20261122-ffff", job="gate", job_id="31", age_s=5, kind="preflight")
    assert find_run("gate", [runs]) == alone
