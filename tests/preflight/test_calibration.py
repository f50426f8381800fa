"""The site's memory: what is measured becomes the yardstick, and every gate leaves one line per node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_files import write_verdict

from janus_cluster.errors import GateFailed, GateUndetermined
from janus_cluster.job.load import load_job
from janus_cluster.job.resolve import resolve_job
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.job.resources import jobs_dir
from janus_cluster.preflight.calibration import (
    append_history,
    load_baseline,
    load_history,
    measured_rates,
    with_baseline,
    with_own_history,
    write_baseline,
)
from janus_cluster.preflight.gate import judge_active
from janus_cluster.run.files import write_json_atomically
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.verdict import CheckResult, State, Verdict

NODES = ("n1", "n2")


def resolve(run_dir: Path) -> ResolvedJob:
    loaded = load_job(jobs_dir() / "demo.yaml", environ={})
    return resolve_job(
        loaded, run_dir=run_dir, cluster="local", environ={}, cwd=run_dir.parent, python="/usr/bin/python3"
    )


def probe(speed: float, node: str = "n1") -> dict[str, Any]:
    rail = {"rail": "ib0", "nodes": list(NODES), "payload_bytes": 10**9, "sum_correct": True, "error": None}
    alone = rail | {"together": False, "times_s": [1 / speed]}
    together = rail | {"together": True, "times_s": [2 / speed]}
    return {
        "node": node,
        "world_size": 2,
        "backend": "gloo",
        "payload_bytes": 10**9,
        "times_s": [1 / speed],
        "sum_correct": True,
        "gemm": [{"rank": 0, "local_rank": 0, "tflops": 10 * speed, "consistent": True}],
        "intra_node": None,
        "rails": [alone, together],
    }


def write_run(path: Path, speeds: dict[str, float], *, state: State = "PASS") -> RunDir:
    run = RunDir(path)
    run.bundle(1).path.mkdir(parents=True)
    run.bundle(1).resolved_json.write_text(resolve(path).model_dump_json())
    attempt = run.begin_attempt()
    for node, speed in speeds.items():
        write_json_atomically(run.all_reduce_json(attempt, node), probe(speed, node))
    write_verdict(run, attempt, [("n1,n2", "rail.ib0", state, "1 GB/s")], state=state, nodes=NODES, created_at=5.0)
    return run


def test_the_median_of_the_nodes_becomes_the_baseline_and_later_runs_are_judged_by_it(tmp_path: Path) -> None:
    site = tmp_path / "site"
    run = write_run(tmp_path / "run", {"n1": 1.0, "n2": 3.0})
    expected = {"all_reduce": 2.0, "gemm": 20.0, "rail.ib0": 2.0, "rails_together.ib0": 1.0}
    assert write_baseline(site, run) == pytest.approx(expected)
    assert load_baseline(site, "cpu", num_nodes=2) == pytest.approx(expected)
    assert load_baseline(site, "cpu", num_nodes=1) == {}
    assert load_baseline(site, "h800-ib", num_nodes=2) == {}
    plain = resolve(tmp_path)
    judged = with_baseline(plain, site)
    assert judged.config_hash == plain.config_hash
    for speed, state in ((2.0, "PASS"), (1.3, "PASS"), (1.1, "WARN"), (0.5, "FAIL")):
        found = judge_active({"n1": probe(speed), "n2": probe(speed)}, judged)
        assert {r.state for r in found if r.id in ("all_reduce", "gemm")} == {state}
        assert {r.state for r in judge_active({"n1": probe(speed), "n2": probe(speed)}, plain)} <= {"PASS", "SKIP"}


def test_a_gate_that_did_not_pass_is_no_yardstick(tmp_path: Path) -> None:
    with pytest.raises(GateFailed):
        write_baseline(tmp_path / "site", write_run(tmp_path / "a", {"n1": 1.0}, state="FAIL"))
    with pytest.raises(GateUndetermined):
        write_baseline(tmp_path / "site", write_run(tmp_path / "b", {}))
    assert not (tmp_path / "site").exists()


def test_every_gate_leaves_one_line_per_node_however_often_it_is_seen(tmp_path: Path) -> None:
    site = tmp_path / "site"
    for name, state in (("one", "PASS"), ("two", "FAIL")):
        run = write_run(tmp_path / name, {"n1": 1.0, "n2": 2.0}, state=state)
        assert len(append_history(site, run)) == 2
        assert append_history(site, run) == []
    lines = load_history(site, "n2")
    assert [(x["run"], x["state"], x["partners"], x["not_passed"]) for x in lines] == [
        ("one", "PASS", ["n1"], []),
        ("two", "FAIL", ["n1"], ["rail.ib0"]),
    ]
    assert lines[0]["rates"] == pytest.approx(measured_rates(probe(2.0), statistic="best"))


def test_the_baseline_of_another_profile_is_kept(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    kept = {"h800-ib, 2 nodes": {"measured": {"gemm": 700.0}}}
    write_json_atomically(site / "baseline.json", {"schema_version": 1, "profiles": kept})
    write_baseline(site, write_run(tmp_path / "run", {"n1": 1.0}))
    assert load_baseline(site, "h800-ib", num_nodes=2) == {"gemm": 700.0}
    assert load_baseline(site, "cpu", num_nodes=2)["gemm"] == 10.0


def test_a_slow_pair_is_shown_beside_earlier_results_of_its_nodes(tmp_path: Path) -> None:
    site = tmp_path / "site"
    row = CheckResult(
        id="rail.ib0", phase="active", node="n1,n2", state="FAIL", measured="slow", expected="fast", fix="swap one end"
    )
    sound = CheckResult(id="gemm", phase="active", node="n1", state="PASS", measured="fast", expected="fast")
    verdict = Verdict(state="FAIL", job_id="7", config_hash="x", nodes=NODES, created_at=5.0, results=(row, sound))
    slow = write_run(tmp_path / "slow", {"n1": 1.0, "n2": 1.0}, state="FAIL")
    for i in range(3):
        assert with_own_history(verdict, site, slow) == verdict, f"{i} earlier runs are too few"
        append_history(site, write_run(tmp_path / f"run{i}", {"n1": 1.0, "n2": 2.0}))
    append_history(site, slow)
    compared = with_own_history(verdict, site, slow)
    assert compared.results[0].fix == (
        "swap one end; n1: 1.00 of its own median over 3 runs; n2: 0.50 of its own median over 3 runs"
    )
    assert (compared.results[1], compared.state) == (sound, "FAIL")
