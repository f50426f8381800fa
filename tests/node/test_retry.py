"""The one retry without a bad node, the variables of a node, and the counters around the probe."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from janus_cluster.job.load import load_job
from janus_cluster.job.resolve import resolve_job
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.job.resources import jobs_dir
from janus_cluster.node.bracket import run_between_counters
from janus_cluster.node.local_launcher import LocalLauncher
from janus_cluster.node.network import network_variables, probe_variables
from janus_cluster.node.retry import Retry, retry_without_bad_nodes
from janus_cluster.node.topology import NodeIdentity
from janus_cluster.preflight.gate import build_verdict
from janus_cluster.run.files import read_json
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.verdict import CheckResult, Verdict

NODES = ("local-01", "local-02")


def resolve(tmp_path: Path, *sets: str, job: str = "demo") -> ResolvedJob:
    loaded = load_job(jobs_dir() / f"{job}.yaml", sets=sets, environ={})
    return resolve_job(loaded, run_dir=tmp_path, cluster="local", environ={}, cwd=tmp_path, python=sys.executable)


def verdict_of(resolved: ResolvedJob, *bad: str) -> Verdict:
    results = [
        CheckResult(id="paths.data", phase="static", node=n, state="FAIL", measured="m", expected="e") for n in bad
    ]
    return build_verdict(results, resolved, nodes=NODES, job_id="7", now=0.0)


@pytest.mark.parametrize(
    ("on_fail", "bad", "word"),
    [
        ("stop", ["local-02"], "preflight.on_fail: stop"),
        ("exclude-and-retry", ["local-01,local-02"], "no single node is to blame"),
        ("exclude-and-retry", ["local-01", "local-02"], "every node failed"),
    ],
)
def test_there_is_no_retry_without_one_bad_node(tmp_path: Path, on_fail: str, bad: list[str], word: str) -> None:
    resolved, run = resolve(tmp_path, f"preflight.on_fail={on_fail}"), RunDir(tmp_path)
    done = retry_without_bad_nodes(run, resolved, LocalLauncher(2), verdict_of(resolved, *bad), attempt=1)
    assert done.is_queued is False and word in done.message
    assert not run.retry_json.exists()


def test_a_retry_that_could_never_start_shows_why_and_is_not_tried_twice(tmp_path: Path) -> None:
    resolved, run = resolve(tmp_path, "preflight.on_fail=exclude-and-retry"), RunDir(tmp_path)
    verdict = verdict_of(resolved, "local-02")
    retry = retry_without_bad_nodes(run, resolved, LocalLauncher(2), verdict, attempt=1)
    assert not retry.is_queued and "without local-02" in retry.message and "no queue" in retry.message
    record = read_json(run.retry_json)
    assert (record["exclude"], record["requeued_at"]) == (["local-02"], None)
    again = retry_without_bad_nodes(run, resolved, LocalLauncher(2), verdict, attempt=2)
    assert again == Retry(False, "not tried again: that was done once already")


def test_the_jobs_own_excluded_host_list_counts_as_its_nodes(tmp_path: Path) -> None:
    resolved = resolve(tmp_path, "preflight.on_fail=exclude-and-retry", "slurm.exclude=gpu[003-005],gpu9")
    retry = retry_without_bad_nodes(
        RunDir(tmp_path), resolved, LocalLauncher(2), verdict_of(resolved, "local-02"), attempt=1
    )
    assert "leave out gpu003, gpu004, gpu005, gpu9, local-02" in retry.message


def test_the_interface_of_the_route_is_given_to_gloo_and_the_users_own_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved, run = resolve(tmp_path), RunDir(tmp_path)
    node = NodeIdentity("local-02", 1, 2)

    def found() -> dict[str, str]:
        variables = network_variables(run, resolved, node, attempt=1, master_addr="127.0.0.1")
        return {v.name: v.value for v in variables}

    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert found() == {"GLOO_SOCKET_IFNAME": "lo"}
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert found() == {}
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    alone = NodeIdentity("local-01", 0, 1)
    assert network_variables(run, resolved, alone, attempt=1, master_addr="127.0.0.1") == []


def test_the_probe_asks_nccl_for_its_log(tmp_path: Path) -> None:
    node = NodeIdentity("n1", 0, 2)
    assert probe_variables(RunDir(tmp_path), resolve(tmp_path), node, attempt=1) == []
    gpus = resolve(tmp_path, job="preflight")
    found = {v.name: v.value for v in probe_variables(RunDir(tmp_path), gpus, node, attempt=1)}
    assert found["NCCL_DEBUG"] == "INFO"
    assert found["NCCL_DEBUG_FILE"].endswith("preflight/attempt_1/nccl.n1.%p.log")
    assert found["NCCL_ALGO"] == "Ring"


def test_counters_are_read_before_and_after(tmp_path: Path) -> None:
    counters = tmp_path / "sys/class/infiniband/mlx5_0/ports/1/counters"
    counters.mkdir(parents=True)
    (counters / "symbol_error").write_text("3\n")
    program = f"open({str(counters / 'symbol_error')!r}, 'w').write('8')"
    out = tmp_path / "counters.json"
    command = [sys.executable, "-c", f"{program}; raise SystemExit(5)"]
    assert run_between_counters(command, os.environ, out, sysfs_root=str(tmp_path)) == 5
    found = read_json(out)
    assert found["before"]["mlx5_0:1"]["symbol_error"] == 3
    assert found["after"]["mlx5_0:1"]["symbol_error"] == 8
