"""The gate's judge: who reported, whose verdict it is, and that nothing passes by accident."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from node_fixtures import OF_THIS_MACHINE, FakeNode

from janus_cluster.errors import GateFailed, GateUndetermined
from janus_cluster.job.load import load_job
from janus_cluster.job.resolve import resolve_job
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.job.resources import jobs_dir
from janus_cluster.preflight.gate import build_verdict, judge_active, judge_static, read_facts, require_fresh
from janus_cluster.run.records.verdict import CheckResult


def resolve(tmp_path: Path, *sets: str) -> ResolvedJob:
    (tmp_path / "demo_data").mkdir(exist_ok=True)
    (tmp_path / "demo_data" / "notes.json").write_text("{}")
    loaded = load_job(jobs_dir() / "demo.yaml", sets=["preflight.min_free_gb=0", *sets], environ={})
    return resolve_job(loaded, run_dir=tmp_path, cluster="local", environ={}, cwd=tmp_path, python="/usr/bin/python3")


def passed(node: str, state: str = "PASS") -> CheckResult:
    return CheckResult(id="x", phase="static", node=node, state=state, measured="", expected="")  # type: ignore[arg-type]


def test_a_sound_node_passes_and_a_silent_one_fails(tmp_path: Path) -> None:
    root = FakeNode(tmp_path / "node").write().root
    resolved = resolve(tmp_path, f"preflight.sysfs_root={root}")
    facts = read_facts(resolved, node="n1")
    results = judge_static({"n1": facts, "n2": None}, resolved)
    by_node = {(r.node, r.id): r.state for r in results if r.id not in OF_THIS_MACHINE}
    assert by_node[("n1", "reported")] == "PASS"
    assert by_node[("n1", "paths.data")] == "PASS"
    assert by_node[("n2", "reported")] == "FAIL"
    assert {state for (node, _), state in by_node.items() if node == "n1"} == {"PASS", "SKIP"}


def test_a_required_path_that_is_missing_fails_by_name(tmp_path: Path) -> None:
    resolved = resolve(tmp_path, f"preflight.require_paths=[{tmp_path}/nowhere]")
    results = judge_static({"n1": read_facts(resolved, node="n1")}, resolved)
    bad = [r for r in results if r.id == "paths.required"]
    assert [r.state for r in bad] == ["FAIL"]
    assert "nowhere" in bad[0].measured


def test_facts_of_another_configuration_are_not_believed(tmp_path: Path) -> None:
    resolved = resolve(tmp_path)
    facts = read_facts(resolve(tmp_path, "training.seed=1"), node="n1")
    results = judge_static({"n1": facts}, resolved)
    assert [(r.id, r.state) for r in results if r.id == "reported"] == [("reported", "FAIL")]


def test_an_all_reduce_that_no_node_reported_fails(tmp_path: Path) -> None:
    results = judge_active({"n1": None, "n2": None}, resolve(tmp_path))
    assert [r.state for r in results] == ["FAIL", "FAIL"]


def test_training_trusts_only_a_fresh_verdict_of_this_job(tmp_path: Path) -> None:
    resolved = resolve(tmp_path)
    now = time.time()
    nodes = ("n1", "n2")
    good = build_verdict([passed("n1"), passed("n2")], resolved, nodes=nodes, job_id="7", now=now)
    require_fresh(good, resolved, nodes=nodes, job_id="7", now=now)
    with pytest.raises(GateUndetermined, match="job 7"):
        require_fresh(good, resolved, nodes=nodes, job_id="8", now=now)
    with pytest.raises(GateUndetermined, match="nodes n1,n2"):
        require_fresh(good, resolved, nodes=("n1", "n3"), job_id="7", now=now)
    with pytest.raises(GateUndetermined, match="s ago"):
        require_fresh(good, resolved, nodes=nodes, job_id="7", now=now + 4000)
    with pytest.raises(GateUndetermined, match="another configuration"):
        require_fresh(good, resolve(tmp_path, "training.seed=1"), nodes=nodes, job_id="7", now=now)


@pytest.mark.parametrize(
    ("state", "error"), [("FAIL", GateFailed), ("ERROR", GateUndetermined), ("SKIP", GateUndetermined)]
)
def test_everything_but_pass_and_warn_ends_the_attempt(tmp_path: Path, state: str, error: type[Exception]) -> None:
    resolved = resolve(tmp_path)
    now = time.time()
    verdict = build_verdict([passed("n1", state)], resolved, nodes=("n1",), job_id="7", now=now)
    with pytest.raises(error):
        require_fresh(verdict, resolved, nodes=("n1",), job_id="7", now=now)


def test_no_result_at_all_is_undetermined(tmp_path: Path) -> None:
    resolved = resolve(tmp_path)
    with pytest.raises(GateUndetermined):
        verdict = build_verdict([], resolved, nodes=("n1",), job_id="7", now=0.0)
        require_fresh(verdict, resolved, nodes=("n1",), job_id="7", now=0.0)
