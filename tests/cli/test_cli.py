"""The command line as users meet it: real processes, their output and their exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from janus_cluster.cli.main import COMMANDS, LazyGroup, cli
from janus_cluster.job.resources import jobs_dir
from tests.tiny_data import write_tiny_data

pytestmark = pytest.mark.slow

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """janus-cluster in an empty folder with demo data; JANUS_HOME inside it."""
    write_tiny_data(tmp_path / "demo_data")

    def call(*argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
        env = {k: v for k, v in os.environ.items() if k not in ("SLURM_CONF", "DEMO_DATA", "DATA_ROOT", "MODEL_PATH")}
        return subprocess.run(
            [sys.executable, "-m", "janus_cluster.cli", *argv],
            cwd=tmp_path,
            env=env | {"JANUS_HOME": str(tmp_path / "home"), "COLUMNS": "160"} | environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )

    return call


def runs(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "home" / "runs"
    return sorted(folder.iterdir()) if folder.exists() else []


def test_the_command_surface_is_frozen() -> None:
    surface = {}
    group = cli
    assert isinstance(group, LazyGroup)
    for name in COMMANDS:
        command = group.get_command(None, name)  # type: ignore[arg-type]
        assert command is not None
        options = [o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("-")]
        surface[name] = sorted(options)
    assert surface == {
        "init": ["--force", "--json", "--partition", "--probe", "--yes"],
        "submit": [
            "--cluster", "--dry-run", "--exclude", "--follow", "--json", "--name", "--no-preflight", "--nodes",
            "--rehearse", "--set",
        ],
        "preflight": [
            "--calibrate", "--cluster", "--exclude", "--json", "--lint-env", "--local", "--nodes", "--profile", "--set",
        ],
        "tail": [
            "--follow", "--grep", "--no-follow", "--node", "--rank", "--raw", "--runs-dir", "--since", "-n",
        ],
        "status": ["--json", "--runs-dir", "--watch"],
        "eval": [
            "--data", "--device", "--generate", "--json", "--max-new-tokens", "--out", "--runs-dir", "--samples",
            "--vggt-path",
        ],
        "simulate": [
            "--batch", "--device", "--episodes", "--json", "--level", "--max-steps", "--out", "--runs-dir", "--seed",
            "--vggt-path",
        ],
        "export": ["--json", "--layout", "--out", "--runs-dir", "--vggt-path"],
        "report": ["--from-log", "--json", "--no-tensorboard", "--out", "--runs-dir", "--tensorboard"],
        "compare": ["--json", "--runs-dir"],
        "list": ["--json", "--runs-dir", "-n"],
        "cancel": ["--json", "--runs-dir", "--yes"],
        "resume": ["--follow", "--json", "--nodes", "--runs-dir", "--set"],
        "nodes": ["--all", "--json"],
        "render": ["--nodes", "--part", "--set"],
        "data": [],
        "plan": ["--gpu", "--json", "--nodes", "--samples", "--set"],
        "config": [],
        "demo-data": ["--episodes", "--json", "--level", "--seed", "--size"],
        "verify-core": ["--compile", "--device", "--dtype", "--json"],
        "sandbox": [],
    }  # fmt: skip


def test_every_command_has_help(run: Run) -> None:
    for name in COMMANDS:
        done = run(name, "--help")
        assert done.returncode == 0, done.stderr
        assert "Usage:" in done.stdout


def test_the_help_agrees_with_the_table_of_commands(run: Run) -> None:
    done = run("--help")
    for name in COMMANDS:
        assert f"  {name} " in done.stdout


def test_a_mistyped_command_gets_a_guess(run: Run) -> None:
    done = run("sumbit")
    assert done.returncode == 2
    assert "did you mean submit?" in done.stderr


def test_a_dry_run_writes_what_submit_would_write(run: Run, tmp_path: Path) -> None:
    done = run("submit", "demo", "--nodes", "2", "--dry-run")
    assert done.returncode == 0, done.stderr
    (folder,) = runs(tmp_path)
    assert f"sbatch {folder}/job.sbatch" in done.stdout
    names = {p.name for p in folder.iterdir()}
    links = {"job.yaml", "resolved.json", "job.sbatch", "env.sh", "ds_config.json", "manifest.json"}
    assert {p.name for p in folder.iterdir() if p.is_symlink()} == links <= names
    assert "submission.json" not in names
    assert "effective batch" in done.stdout


def test_the_next_lines_of_a_dry_run_can_be_pasted_where_a_path_has_blanks(run: Run, tmp_path: Path) -> None:
    done = run("submit", "demo", "--cluster", "local", "--dry-run", JANUS_HOME=str(tmp_path / "我的 目录"))
    (script,) = (tmp_path / "我的 目录" / "runs").glob("*/job.sbatch")
    assert f"less '{script}'" in done.stdout
    assert f"JANUS_LAUNCHER=local bash '{script}'" in done.stdout


def test_the_json_of_a_dry_run_keeps_its_contract(run: Run, tmp_path: Path) -> None:
    done = run("submit", "demo", "--dry-run", "--json")
    value: dict[str, Any] = json.loads(done.stdout)
    assert list(value) == ["run_dir", "sbatch", "job_id", "command", "env", "ds_config", "effective_batch"]
    (folder,) = runs(tmp_path)
    assert value["run_dir"] == str(folder)
    assert value["command"] == ["sbatch", value["sbatch"]]
    assert value["job_id"] is None
    assert value["ds_config"] == json.loads((folder / "ds_config.json").read_text())
    assert value["env"]["DS_ACCELERATOR"] == "cpu"
    assert value["effective_batch"] == value["ds_config"]["train_batch_size"]


def test_the_json_of_status_keeps_its_contract(run: Run, tmp_path: Path) -> None:
    run("submit", "demo", "--dry-run")
    done = run("status", runs(tmp_path)[0].name, "--json")
    value = json.loads(done.stdout)
    value = value[0] if isinstance(value, list) else value
    assert list(value)[:11] == [
        "job_id", "name", "state", "source", "age_s", "attempt", "nodes", "step", "total_steps", "exit_code", "reason",
    ]  # fmt: skip


def test_a_job_file_of_a_run_can_be_submitted_again(run: Run, tmp_path: Path) -> None:
    run("submit", "demo", "--set", "training.seed=7", "--dry-run")
    first = runs(tmp_path)[0]
    done = run("submit", str(first / "job.yaml"), "--dry-run", "--name", "again")
    assert done.returncode == 0, done.stderr
    second = next(p for p in runs(tmp_path) if p.name.startswith("again"))
    jobs = [json.loads((p / "resolved.json").read_text())["job"] for p in (first, second)]
    assert jobs[0] | {"name": "again"} == jobs[1]
    assert jobs[1]["training"]["seed"] == 7


def write(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "bad.yaml"
    path.write_bytes(data)
    return str(path)


BAD: dict[str, tuple[bytes | None, list[str], list[str]]] = {
    "missing job file": (None, ["absent.yaml"], ["absent.yaml", "no such job file"]),
    "unknown key": (b"name: x\ntrainin: {}\n", [], ["bad.yaml:2", "trainin", "training"]),
    "wrong type": (b"name: x\ntraining: {num_epochs: many}\n", [], ["bad.yaml:2", "training.num_epochs", "many"]),
    "--nodes 65": (None, ["demo", "--nodes", "65"], ["--nodes: nodes: 65", "less than or equal to 64"]),
    "unreadable YAML": (b"name: [x\n", [], ["bad.yaml", "not readable as YAML"]),
    "tabs": (b"name: x\ndata:\n\troots: /d\n", [], ["bad.yaml:3", "tab"]),
    "duplicate keys": (b"name: x\nname: y\n", [], ["bad.yaml:2", "duplicate"]),
    "binary file": (bytes(range(256)), [], ["bad.yaml", "not UTF-8"]),
    "missing data path": (None, ["demo", "--set", "data.roots=[/no/such/place]"], ["data.roots", "/no/such/place"]),
    "wrong sbatch option": (None, ["demo", "--set", "slurm.partion=gpu"], ["slurm.partion", "partition"]),
    "wrong walltime": (None, ["demo", "--set", "slurm.time=tomorrow"], ["slurm.time", "tomorrow", "HH:MM:SS"]),
    "wrong ZeRO key": (
        None,
        ["demo", "--set", "deepspeed.overrides.zero_optimization.reduce_bucket=1"],
        ["reduce_bucket", "reduce_bucket_size"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_2_shows_what_to_do_and_writes_nothing(run: Run, tmp_path: Path, case: str) -> None:
    data, argv, words = BAD[case]
    argv = [write(tmp_path, data)] if data is not None else argv
    done = run("submit", *argv, "--dry-run")
    assert done.returncode == 2, done.stdout + done.stderr
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 25, "more than a screen"
    assert runs(tmp_path) == []


def test_a_folder_without_weights_is_refused_before_anything_is_written(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    sets = ["model.path=model", "model.vggt_path=model", "data.roots=[demo_data]", "training.memory=manual"]
    options = [word for value in sets for word in ("--set", value)]
    refused = run("submit", "train_1node", "--cluster", "local", "--dry-run", *options)
    assert refused.returncode == 2
    assert f"{tmp_path / 'model' / 'config.json'}" in refused.stderr
    assert runs(tmp_path) == []


@pytest.mark.parametrize("command", ["submit", "tail", "status", "report", "verify-core", "config check", "eval"])
def test_a_name_longer_than_a_path_ends_with_2_and_no_traceback(run: Run, command: str) -> None:
    done = run(*command.split(), "a" * 5000)
    assert done.returncode == 2
    assert "characters, longer than a path may be" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr) < 400


def test_no_slurm_names_both_ways_out(run: Run, tmp_path: Path) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    done = run("submit", "demo", PATH=str(empty))
    assert done.returncode == 21
    assert "--cluster local" in done.stderr
    assert "--cluster sandbox" in done.stderr
    assert runs(tmp_path) == []


def test_a_refusal_of_sbatch_is_quoted_and_leaves_nothing(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (
        ("sbatch", "echo 'sbatch: error: invalid partition specified: gold' >&2\nexit 1"),
        ("srun", "exit 0"),
    ):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    done = run("submit", "demo", PATH=f"{folder}{os.pathsep}{os.environ['PATH']}")
    assert done.returncode == 2
    assert "invalid partition specified: gold" in done.stderr
    assert runs(tmp_path) == []


def test_janus_home_sets_the_folder_of_runs(run: Run, tmp_path: Path) -> None:
    run("submit", "demo", "--dry-run", JANUS_HOME=str(tmp_path / "else where"))
    assert len(list((tmp_path / "else where" / "runs").iterdir())) == 1


def test_config_show_prints_the_origin_of_each_value(run: Run) -> None:
    done = run("config", "show", "demo", "--set", "training.seed=3")
    assert "training.seed = 3    # --set" in done.stdout
    assert "# default" in done.stdout
    assert f"{jobs_dir() / 'demo.yaml'}:" in done.stdout


def test_config_schema_is_a_json_schema_that_knows_every_section(run: Run) -> None:
    schema = json.loads(run("config", "schema").stdout)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert {"training", "slurm", "deepspeed"} <= set(schema["properties"])


@pytest.mark.parametrize(("part", "word"), [("sbatch", "#SBATCH --nodes=2"), ("env", "export "), ("ds", '"stage": 3')])
def test_render_prints_without_writing(run: Run, tmp_path: Path, part: str, word: str) -> None:
    done = run("render", "demo", "--part", part)
    assert done.returncode == 0, done.stderr
    assert word in done.stdout
    assert runs(tmp_path) == []


@pytest.mark.parametrize("sets", [(), ("--set", "runs_dir=elsewhere")])
def test_render_names_the_run_folder_that_submit_would_make(run: Run, tmp_path: Path, sets: tuple[str, ...]) -> None:
    folder = tmp_path / ("elsewhere" if sets else "home/runs")
    assert f"{folder}/demo-<time>-<id>/logs" in run("render", "demo", *sets).stdout
    made = run("submit", "demo", "--cluster", "local", "--dry-run", "--json", *sets)
    assert Path(json.loads(made.stdout)["run_dir"]).parent == folder


def test_list_shows_the_kind_of_each_run(run: Run, tmp_path: Path) -> None:
    run("submit", "demo", "--cluster", "local", "--dry-run")
    (tmp_path / "gate.yaml").write_text("name: gate\nkind: preflight\npreflight: {profile: cpu}\n")
    assert run("submit", "gate.yaml", "--cluster", "local", "--dry-run").returncode == 0
    rows = [line.split() for line in run("list").stdout.splitlines()]
    assert sorted(row[2] for row in rows) == ["kind", "preflight", "train"]
    assert {row["kind"] for row in json.loads(run("list", "--json").stdout)} == {"preflight", "train"}


def test_an_unknown_job_is_reported_with_what_to_type(run: Run) -> None:
    done = run("tail", "4711")
    assert done.returncode == 22
    assert "no run .4711." in done.stderr.replace(chr(39), ".")
