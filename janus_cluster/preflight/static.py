"""The static phase judged: every family of every node; a node that did not report is FAIL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.preflight.cpus import judge_cpus
from janus_cluster.preflight.environment import judge_environment
from janus_cluster.preflight.gpu import judge_gpus
from janus_cluster.preflight.gpu_health import judge_gpu_health, merge_repeated
from janus_cluster.preflight.gpu_processes import judge_processes
from janus_cluster.preflight.hca import chosen_hcas
from janus_cluster.preflight.hca_judge import judge_hcas
from janus_cluster.preflight.limits import judge_limits
from janus_cluster.preflight.model import Check
from janus_cluster.preflight.nvlink import judge_nvlink
from janus_cluster.preflight.paths import judge_paths
from janus_cluster.preflight.pcie import judge_pcie_paths
from janus_cluster.preflight.route import judge_route
from janus_cluster.preflight.site_kind import find_kind, judge_kind, reads_hcas
from janus_cluster.preflight.temporary import judge_temporary
from janus_cluster.preflight.versions import judge_driver, judge_same_versions, judge_versions
from janus_cluster.preflight.xid import judge_xids
from janus_cluster.run.records.verdict import CheckResult


def judge_static(facts_by_node: Mapping[str, dict[str, Any] | None], resolved: ResolvedJob) -> list[CheckResult]:
    """Every static check of every node, and that their software is the same."""
    results: list[CheckResult] = []
    reported: dict[str, dict[str, Any]] = {}
    for node, facts in facts_by_node.items():
        if facts is not None and facts["config_hash"] == resolved.config_hash:
            reported[node] = facts
        results.append(_judge_reported(facts, node, node in reported))
        if node in reported:
            results += judge_node(reported[node], resolved, node)
    if len(reported) > 1:
        results += judge_same_versions({node: facts["versions"] for node, facts in reported.items()})
    return blame_the_odd(results)


def blame_the_odd(results: Sequence[CheckResult]) -> list[CheckResult]:
    """A FAIL of a site's or a job's kind is a node's own where another node of the job has another result."""
    states: dict[str, set[str]] = {}
    for r in results:
        states.setdefault(r.id, set()).add(r.state)
    is_odd = {check: len(seen) > 1 for check, seen in states.items()}
    return [
        replace(r, blames_node=True) if r.state == "FAIL" and not r.blames_node and is_odd[r.id] else r for r in results
    ]


def _judge_reported(facts: dict[str, Any] | None, node: str, is_of_this_job: bool) -> CheckResult:
    check = Check(
        id="reported", node=node, expected="facts within preflight.timeout_s", source="preflight.timeout_s", unit="s"
    )
    if facts is None or not is_of_this_job:
        fix = f"is {node} up? see logs/batch.log and the node's log of this attempt"
        return check.judged("FAIL", "no facts for this job from this node", fix=fix)
    return check.judged("PASS", f"as {facts['hostname']}", duration_s=facts["duration_s"])


def judge_node(facts: dict[str, Any], resolved: ResolvedJob, node: str) -> list[CheckResult]:
    """Every static check of one node that reported."""
    kind = find_kind(facts, resolved)
    profile, gpus = kind.profile, resolved.job.hardware.gpus_per_node
    own = {v.name: v.value for v in resolved.env if v.origin.startswith("environment.")}
    chosen = chosen_hcas(facts["environ"], own)
    results = judge_kind(kind, resolved, node=node)
    results += judge_gpus(facts.get("gpu", {}), profile["gpu"], node=node, gpus_per_node=gpus)
    if profile["gpu"]["wanted"]:
        results += judge_gpu_health(facts["gpu"], profile["gpu"], node=node, gpus_per_node=gpus)
        results += judge_processes(facts["gpu"], profile["gpu"], node=node)
        results += judge_nvlink(facts["gpu"], profile["gpu"], node=node, gpus_per_node=gpus)
        results = merge_repeated(results)
        results += judge_xids(facts["kernel_log"], profile["gpu"], node=node)
        results += judge_driver(facts["versions"], facts["gpu"], node=node)
    results += judge_hcas(facts, profile["hca"], node=node, chosen=chosen) if reads_hcas(facts, profile) else []
    if profile["hca"]["wanted"] and "pcie" in facts:
        results += judge_pcie_paths(facts["pcie"], node=node)
    return [
        *results,
        *judge_route(facts["route"], profile["net"], node=node),
        *judge_limits(facts["limits"], profile["limits"], node=node),
        judge_cpus(facts["cpus"], resolved, node=node),
        judge_temporary(facts["temporary"], profile["limits"]["tmp_gib"], node=node, compiles=profile["gpu"]["wanted"]),
        *judge_paths(facts["paths"], resolved.job, node=node),
        *judge_versions(facts["versions"], node=node, ranges=profile["versions"]),
        *judge_environment(
            facts["environ"],
            resolved,
            node=node,
            torch=facts["versions"].get("torch"),
            interfaces=facts["interface_names"],
            unset=facts.get("unset", ()),
        ),
    ]
