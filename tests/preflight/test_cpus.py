"""CPUs of the job on a node: affinity and quota against ranks and their data workers."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest

from janus_cluster.job.load import load_job
from janus_cluster.job.resolve import resolve_job
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.job.resources import jobs_dir
from janus_cluster.preflight.cpus import judge_cpus, read_cpus, usable_cpus
from janus_cluster.preflight.static import blame_the_odd
from janus_cluster.preflight.sysfs import NodeRoot

PATHS = {"MODEL_PATH": "/m", "VGGT_MODEL_PATH": "/v", "DATA_ROOT": "/d"}
# 8 ranks with 4 data workers each.
RANKS, NEEDED = 8, 40


@functools.cache
def resolve(name: str = "train_1node") -> ResolvedJob:
    here = Path(__file__).parent
    loaded = load_job(jobs_dir() / f"{name}.yaml", sets=[f"data.num_workers={NEEDED // RANKS - 1}"], environ=PATHS)
    return resolve_job(loaded, run_dir=here / "run", cluster="slurm", environ={}, cwd=here, python=sys.executable)


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def node(tmp_path: Path) -> NodeRoot:
    (tmp_path / "proc").mkdir()
    (tmp_path / "sys").mkdir()
    return NodeRoot.of(str(tmp_path))


@pytest.mark.parametrize(
    ("online", "allowed", "quota", "state"),
    [
        (128, 128, None, "PASS"),
        (128, NEEDED, None, "PASS"),
        (128, NEEDED - 1, None, "WARN"),
        (128, RANKS, None, "WARN"),
        (128, RANKS - 1, None, "FAIL"),
        (128, 1, None, "FAIL"),
        (128, 128, 7.5, "FAIL"),
        (128, 128, 64.0, "PASS"),
        # The node itself has no more.
        (2, 2, None, "WARN"),
    ],
)
def test_cpus_are_compared_with_ranks_and_workers(online: int, allowed: int, quota: float | None, state: str) -> None:
    fact = {"online": online, "allowed": allowed, "quota": quota}
    assert judge_cpus(fact, resolve(), node="n1").state == state


def test_one_cpu_for_eight_ranks_names_the_key_and_blames_no_node() -> None:
    fact = {"online": 128, "allowed": 1, "quota": None}
    results = [judge_cpus(fact, resolve(), node=node) for node in ("n1", "n2")]
    assert results[0].measured == "1 of the node's 128 CPUs"
    assert f"--set slurm.cpus-per-task={NEEDED}" in results[0].fix
    assert not any(r.blames_node for r in blame_the_odd(results))


def test_a_node_that_alone_gives_too_few_is_blamed() -> None:
    facts = {"n1": 128, "n2": 1}
    results = [judge_cpus({"online": 128, "allowed": n, "quota": None}, resolve(), node=i) for i, n in facts.items()]
    assert [r.node for r in blame_the_odd(results) if r.blames_node and r.state == "FAIL"] == ["n2"]


def test_a_gate_without_training_is_not_refused_for_its_own_few_cpus() -> None:
    fact = {"online": 128, "allowed": 1, "quota": None}
    assert judge_cpus(fact, resolve("preflight"), node="n1").state == "WARN"


def test_the_least_quota_of_the_cgroup_and_those_above_counts(node: NodeRoot) -> None:
    put(node.proc / "self" / "cgroup", "0::/job_7/step_0\n")
    put(node.sys / "fs" / "cgroup" / "job_7" / "step_0" / "cpu.max", "max 100000\n")
    assert read_cpus(node)["quota"] is None
    put(node.sys / "fs" / "cgroup" / "job_7" / "cpu.max", "50000 100000\n")
    fact = read_cpus(node)
    assert (fact["quota"], usable_cpus(fact)) == (0.5, 0.5)


@pytest.mark.parametrize(("text", "quota"), [("-1\n", None), ("250000\n", 2.5), ("", None), ("max\n", None)])
def test_version_1_has_its_quota_elsewhere(node: NodeRoot, text: str, quota: float | None) -> None:
    put(node.proc / "self" / "cgroup", "4:cpu,cpuacct:/slurm/job_7\n0::/\n")
    put(node.sys / "fs" / "cgroup" / "cpu" / "slurm" / "job_7" / "cpu.cfs_quota_us", text)
    assert read_cpus(node)["quota"] == quota
