"""What each node has of its own: setup_each_node and $${NAME}, as real tasks see them. srun is a script on PATH."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from janus_cluster.errors import StepNotStarted
from janus_cluster.job.load import load_job
from janus_cluster.job.resolve import resolve_job
from janus_cluster.job.resources import jobs_dir
from janus_cluster.node.gate import check_nodes
from janus_cluster.node.phases import Attempt, StopSignals
from janus_cluster.node.slurm_launcher import SlurmLauncher
from janus_cluster.run.bundle import render_bundles, run_written
from janus_cluster.run.manifest import collect_manifest
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.gate import FactsRecord
from janus_cluster.run.records.verdict import CheckResult

NODES = ("localhost", "127.0.0.2")
# Starts the task once for each node, as srun does.
SRUN = """#!/bin/bash
while [ "${1#-}" != "$1" ]; do shift; done
k=0; pids=()
for node in localhost 127.0.0.2; do
    SLURMD_NODENAME=$node SLURM_NODEID=$k SLURM_STEP_NUM_NODES=2 "$@" & pids+=($!); k=$((k + 1))
done
r=0; for pid in "${pids[@]}"; do wait "$pid" || r=$?; done; exit $r
"""


def attempt_with(folder: Path, monkeypatch: pytest.MonkeyPatch, *sets: str) -> Attempt:
    (folder / "bin").mkdir()
    (folder / "bin" / "srun").write_text(SRUN)
    (folder / "bin" / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")
    run = RunDir(folder / "run")
    loaded = load_job(jobs_dir() / "demo.yaml", sets=sets, environ={})
    resolved = resolve_job(loaded, run_dir=run.path, cluster="slurm", environ={}, cwd=folder, python=sys.executable)
    manifest = collect_manifest(jobs_dir() / "demo.yaml", code={})
    with run_written(run, render_bundles(resolved, job_yaml_text="", secrets={}, manifest=manifest), code={}):
        pass
    return Attempt(run, resolved, SlurmLauncher("slurm", "7", NODES), StopSignals())


def facts_of(attempt: Attempt) -> list[dict[str, str]]:
    paths = [attempt.run.facts_json(attempt.number, node) for node in NODES]
    return [FactsRecord.require(path).values["environ"] for path in paths]


def environment_of(results: list[CheckResult]) -> list[tuple[str | None, str, bool]]:
    return [(r.node, r.state, r.blames_node) for r in results if r.id == "environment"]


def test_each_node_has_its_own_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = attempt_with(
        tmp_path,
        monkeypatch,
        "environment.setup_each_node=[export SCRATCH=/local/$SLURMD_NODENAME]",
        "environment.variables.NCCL_DEBUG_FILE=$${SCRATCH}/nccl",
    )
    check_nodes(attempt)
    assert [found["NCCL_DEBUG_FILE"] for found in facts_of(attempt)] == [f"/local/{node}/nccl" for node in NODES]


def test_a_variable_that_a_node_lacks_fails_its_gate_and_is_no_literal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = check_nodes(
        attempt := attempt_with(tmp_path, monkeypatch, "environment.variables.NCCL_DEBUG_FILE=$${NEVER_SET}/nccl")
    )
    assert environment_of(results) == [(node, "FAIL", False) for node in NODES]
    assert all("NCCL_DEBUG_FILE" not in found for found in facts_of(attempt))
    assert "NEVER_SET" in next(r.measured for r in results if r.id == "environment")


def test_a_line_for_each_node_that_fails_everywhere_is_the_jobs_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = attempt_with(tmp_path, monkeypatch, "environment.setup_each_node=[mkdir /proc/x]")
    with pytest.raises(StepNotStarted, match=r"setup_each_node: exit code 1 of: mkdir /proc/x") as caught:
        check_nodes(attempt)
    assert caught.value.kind == "environment"
