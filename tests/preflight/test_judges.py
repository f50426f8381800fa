"""Judges at, above and below their thresholds; readers on real files and on programs put on PATH."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from node_fixtures import write_packages

from janus_cluster.job.profiles import load_preflight_profile
from janus_cluster.preflight.all_reduce import busbw_gb_per_s, floor_of, judge_all_reduce
from janus_cluster.preflight.rate import Limit
from janus_cluster.preflight.report import render_summary, render_verdict, render_verdict_markdown
from janus_cluster.preflight.sysfs import NodeRoot
from janus_cluster.preflight.versions import PACKAGES, judge_driver, judge_same_versions, judge_versions, read_versions
from janus_cluster.run.records.verdict import CheckResult, Verdict, worst

RANGES = {"python_min": "3.10", "torch_min": "2.6", "transformers_below": "6", "cuda_wanted": True}


def result(state: str, node: str = "n1", check: str = "x") -> CheckResult:
    return CheckResult(id=check, phase="static", node=node, state=state, measured="m", expected="e")  # type: ignore[arg-type]


def verdict(*results: CheckResult) -> Verdict:
    return Verdict(
        state=worst([r.state for r in results]),
        job_id="7",
        config_hash="c" * 64,
        nodes=("n1", "n2"),
        created_at=0.0,
        results=results,
    )


@pytest.mark.parametrize(
    ("states", "wins"),
    [
        (["PASS", "SKIP"], "PASS"),
        (["PASS", "WARN", "SKIP"], "WARN"),
        (["WARN", "ERROR"], "ERROR"),
        (["ERROR", "FAIL", "PASS"], "FAIL"),
        (["SKIP"], "SKIP"),
        ([], "ERROR"),
    ],
)
def test_the_worst_result_wins_and_nothing_is_never_a_pass(states: list[str], wins: str) -> None:
    assert worst(states) == wins


def test_busbw_is_as_nccl_tests_defines_it() -> None:
    assert busbw_gb_per_s([0.01, 0.02, 0.5], payload_bytes=10**9, world_size=8) == pytest.approx(50 * 1.75)
    assert busbw_gb_per_s([1.0], payload_bytes=10**9, world_size=2) == pytest.approx(1.0)
    assert busbw_gb_per_s([1.0], payload_bytes=10**9, world_size=16) == pytest.approx(1.875)
    assert busbw_gb_per_s([1.0], payload_bytes=10**9, world_size=1) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="positive"):
        busbw_gb_per_s([], payload_bytes=1, world_size=2)


def all_reduce(**changes: Any) -> dict[str, Any]:
    facts = {"world_size": 2, "backend": "gloo", "payload_bytes": 10**9, "times_s": [0.5] * 3, "sum_correct": True}
    return facts | changes


@pytest.mark.parametrize(
    ("facts", "state", "word"),
    [
        (all_reduce(), "PASS", "2 GB/s busbw (1000 MB"),
        (all_reduce(times_s=[0.4] * 3), "PASS", "2.5"),
        (all_reduce(times_s=[0.6] * 3), "FAIL", "1.67"),
        (all_reduce(sum_correct=False), "FAIL", "sum was wrong"),
        (all_reduce(world_size=1), "FAIL", "1 of 2 ranks"),
        (None, "FAIL", "did not report"),
    ],
)
def test_all_reduce_is_judged_at_above_and_below_the_floor(facts: dict[str, Any] | None, state: str, word: str) -> None:
    judged = judge_all_reduce(facts, node="n1", world_size=2, floor=Limit(2.0, "FAIL", "s"))
    assert judged.state == state
    assert word in judged.measured
    assert (judged.fix == "") == (state == "PASS")


@pytest.mark.parametrize(("nodes", "floor"), [(1, 135.0), (2, 130.0), (4, 127.8), (8, 123.5), (64, 84.5)])
def test_the_floor_of_the_all_reduce_falls_with_the_steps_of_the_ring(nodes: int, floor: float) -> None:
    """By hand for 4 nodes: 62 steps, 6 between nodes: 1.9 × (56 × 3.4 + 6 × 14) = 521 µs, × 32/62 a byte's way; for 2
    nodes 1.9 × (28 × 3.4 + 2 × 14) = 234 µs, × 16/30. 1.0737 GB / 130 GB/s + 269 µs - 125 µs = 8.404 ms: 127.8 GB/s.
    """
    row = load_preflight_profile("h800-ib")["all_reduce"]["busbw_gb_per_s"]
    limit = floor_of(row, nodes=nodes, gpus_per_node=8, payload_bytes=1 << 30)
    assert (limit.value, limit.state) == (pytest.approx(floor, abs=0.05), "FAIL")
    assert nodes <= 2 or f"ring over {nodes}" in limit.source


def test_versions_of_this_environment_are_read() -> None:
    facts = read_versions(NodeRoot.of(None))
    assert facts["python"]
    assert facts["janus-cluster"]
    assert judge_versions(facts, node="n1", ranges={"python_min": "99.0"})[0].state == "FAIL"


def test_versions_are_those_that_python_would_import(tmp_path: Path) -> None:
    write_packages(tmp_path, {"torch": "9.9.9", "transformers": "99.0", "nvidia-nccl-cu13": "9.8.7"}, cuda="13.9")
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('it is not to be imported')")
    code = (
        "import json; from janus_cluster.preflight.sysfs import NodeRoot\n"
        "from janus_cluster.preflight.versions import read_versions\n"
        "print(json.dumps(read_versions(NodeRoot.of(None))))"
    )
    environ = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    facts = json.loads(done.stdout)
    found = {name: facts[name] for name in ("torch", "cuda", "nccl", "transformers")}
    assert found == {"torch": "9.9.9", "cuda": "13.9", "nccl": "9.8.7", "transformers": "99.0"}


def test_versions_of_a_stand_in_are_its_own_and_what_it_lacks_is_absent(tmp_path: Path) -> None:
    write_packages(tmp_path / "site-packages", {"torch": "2.6.0+cu118", "nvidia-nccl-cu11": "2.21.5"}, cuda="11.8")
    facts = read_versions(NodeRoot.of(str(tmp_path)))
    assert (facts["torch"], facts["cuda"], facts["nccl"]) == ("2.6.0+cu118", "11.8", "2.21.5")
    assert (facts["transformers"], facts["pydantic"]) == (None, None)


def test_a_missing_package_and_a_differing_node_fail() -> None:
    whole: dict[str, str | None] = {"python": "3.11.7", "cuda": "12.8"} | dict.fromkeys(PACKAGES, "3.0")
    assert judge_versions(whole, node="n1", ranges=RANGES)[0].state == "PASS"
    lacking = judge_versions(whole | {"torch": None}, node="n1", ranges=RANGES)[0]
    assert (lacking.state, "torch not installed" in lacking.measured) == ("FAIL", True)
    judged = judge_same_versions({"n1": whole, "n2": whole | {"torch": "2.0"}})
    assert [(r.node, r.state) for r in judged] == [("n1", "PASS"), ("n2", "FAIL")]
    assert "torch 2.0 ≠ 3.0" in judged[1].measured


@pytest.mark.parametrize(
    ("changes", "state", "word"),
    [
        ({"torch": "2.6.0+cu124"}, "PASS", ""),
        ({"torch": "2.5.1"}, "FAIL", "torch 2.5.1 < 2.6"),
        ({"transformers": "6.0.0"}, "FAIL", "transformers 6.0.0 >= 6"),
        ({"transformers": "5.99"}, "PASS", ""),
        ({"python": "3.9.18"}, "FAIL", "python 3.9.18 < 3.10"),
    ],
)
def test_versions_are_judged_at_the_ends_of_their_range(changes: dict[str, str], state: str, word: str) -> None:
    whole: dict[str, str | None] = {"python": "3.10", "cuda": "12.8"} | dict.fromkeys(PACKAGES, "3.0") | changes
    (judged,) = judge_versions(whole, node="n1", ranges=RANGES)
    assert judged.state == state
    assert word in judged.measured


def test_a_torch_without_cuda_is_reported_where_gpus_are_wanted() -> None:
    whole: dict[str, str | None] = {"python": "3.11", "cuda": None} | dict.fromkeys(PACKAGES, "3.0")
    assert [(r.id, r.state) for r in judge_versions(whole, node="n1", ranges=RANGES)] == [
        ("versions.cuda", "WARN"),
        ("versions", "PASS"),
    ]


@pytest.mark.parametrize(
    ("cuda", "driver", "found"),
    [
        ("13.0", "535.183.01", [("WARN", "driver 535.183.01, CUDA 13.0")]),
        ("13.0", "580.65.06", [("PASS", "driver 580.65.06, CUDA 13.0")]),
        ("12.8", "535.183.01", [("PASS", "driver 535.183.01, CUDA 12.8")]),
        (None, "535.183.01", []),
        ("12.8", "", []),
        ("99.0", "535.183.01", []),
    ],
)
def test_a_driver_that_is_older_than_torchs_cuda_is_reported(
    cuda: str | None, driver: str, found: list[tuple[str, str]]
) -> None:
    gpus = {"identity": {"rows": [{"index": "0", "driver_version": driver}]}}
    assert [(r.state, r.measured) for r in judge_driver({"cuda": cuda}, gpus, node="n1")] == found


def test_a_verdict_survives_its_json_and_names_the_bad_node() -> None:
    v = verdict(result("PASS"), result("FAIL", "n2", "paths.model"))
    assert Verdict.from_json(v.to_json()) == v
    assert v.exclude == ("n2",)
    assert v.summary() == "preflight FAIL: n2 paths.model (m)"
    assert v.of_node("n1").state == "PASS"
    assert v.worst_first()[0].node == "n2"


def test_what_every_node_lacks_blames_the_job_and_not_the_nodes() -> None:
    both = [result("FAIL", node, "paths.model") for node in ("n1", "n2")]
    assert verdict(*both).exclude == ()
    assert verdict(*both, result("FAIL", "n2", "hca.rails")).exclude == ("n2",)
    assert verdict(*(result("FAIL", node, "hca.rails") for node in ("n1", "n2"))).exclude == ("n1", "n2")
    assert verdict(result("FAIL", "n1", "all_reduce")).exclude == ()


def test_the_json_report_has_its_five_keys_and_keeps_pairs_apart() -> None:
    pair = CheckResult(id="rail", phase="active", node="n1,n2", state="FAIL", measured="m", expected="e")
    report = verdict(result("PASS"), result("FAIL", "n2", "paths.model"), pair).to_report()
    assert list(report) == ["verdict", "exit_code", "nodes", "cross_node", "exclude"]
    assert (report["verdict"], report["exit_code"], report["exclude"]) == ("FAIL", 2, ["n2"])
    assert {node: [r["id"] for r in results] for node, results in report["nodes"].items()} == {
        "n1": ["x"],
        "n2": ["paths.model"],
    }
    assert [r["id"] for r in report["cross_node"]] == ["rail"]
    assert list(report["nodes"]["n1"][0]) == [
        "id", "phase", "node", "state", "measured", "expected", "unit", "threshold_source", "fix", "duration_s",
        "blames_node",
    ]  # fmt: skip


def test_the_report_shows_worst_first_and_the_exclude_line() -> None:
    from rich.console import Console

    v = verdict(result("PASS"), result("FAIL", "n2", "paths.model"))
    console = Console(width=120, record=True, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123
    console.print(render_verdict(v))
    console.file.close()
    text = console.export_text()
    assert text.index("FAIL") < text.index("PASS")
    assert "--exclude=n2" in text
    assert "| FAIL | n2 | paths.model |" in render_verdict_markdown(v)


def active(test: str, measured: str, *, node: str = "n1,n2") -> CheckResult:
    return CheckResult(id=test, phase="active", node=node, state="PASS", measured=measured, expected=">= 43 GB/s")


def test_a_log_has_every_fault_once_with_its_nodes_and_its_mend() -> None:
    both = [
        CheckResult(id="paths.model", phase="static", node=n, state="FAIL", measured="gone", expected="there", fix="ls")
        for n in ("n1", "n2")
    ]
    assert render_summary(verdict(result("PASS"), *both), details="verdict.md") == [
        "preflight FAIL: 1 PASS, 2 FAIL; every check: verdict.md",
        "FAIL  paths.model  n1, n2",
        "      measured  gone",
        "      expected  there",
        "      mend      ls",
    ]
    assert verdict(*both).summary() == "preflight FAIL: n1, n2 paths.model (gone)"
    assert render_summary(verdict(result("FAIL", "n2", "hca.rails")), details="")[-1] == (
        "without the bad nodes: --exclude=n2"
    )


def test_a_log_has_the_rates_of_a_sound_gate() -> None:
    rails = [active(f"rail.gpu{k}", f"{48 + k} GB/s") for k in range(8)]
    speed = active("all_reduce", "330 GB/s", node="n1")
    assert render_summary(verdict(result("PASS"), *rails, speed, result("SKIP")), details="v.md") == [
        "preflight PASS: 10 PASS, 1 SKIP; every check: v.md",
        "  all_reduce      n1: 330 GB/s; >= 43 GB/s",
        "  rail            8 sound",
    ]
