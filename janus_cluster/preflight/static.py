"""The static phase judged: every family of every node; a node that did not report is FAIL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from janus_cluster.config.schema import ResolvedJob
from janus_cluster.preflight.environment import judge_environment
from janus_cluster.preflight.gpu import judge_gpus
from janus_cluster.preflight.gpu_health import judge_gpu_health
from janus_cluster.preflight.hca import parse_hca_list
from janus_cluster.preflight.hca_judge import judge_hcas
from janus_cluster.preflight.limits import judge_limits
from janus_cluster.preflight.model import Check, CheckResult
from janus_cluster.preflight.nvlink import judge_nvlink
from janus_cluster.preflight.paths import judge_paths
from janus_cluster.preflight.route import judge_route
from janus_cluster.preflight.temporary import judge_temporary
from janus_cluster.preflight.versions import judge_driver, judge_same_versions, judge_versions
from janus_cluster.preflight.xid import judge_xids


def judge_static(facts_by_node: Mapping[str, dict[str, Any] | None], resolved: ResolvedJob) -> list[CheckResult]:
    """Every static check of every node, and that their software is the same."""
    results: list[CheckResult] = []
    believed: dict[str, dict[str, Any]] = {}
    for node, facts in facts_by_node.items():
        if facts is not None and facts["config_hash"] == resolved.config_hash:
            believed[node] = facts
        results.append(_judge_reported(facts, node, node in believed))
        if node in believed:
            results += judge_node(believed[node], resolved, node)
    if len(believed) > 1:
        results += judge_same_versions({node: facts["versions"] for node, facts in believed.items()})
    return results


def _judge_reported(facts: dict[str, Any] | None, node: str, is_believed: bool) -> CheckResult:
    check = Check(
        id="reported", node=node, expected="facts within preflight.timeout_s", source="preflight.timeout_s", unit="s"
    )
    if facts is None or not is_believed:
        fix = f"is {node} up? see logs/batch.log and the node's log of this attempt"
        return check.judged("FAIL", "no facts for this job from this node", fix=fix)
    return check.judged("PASS", f"as {facts['hostname']}", duration_s=facts["duration_s"])


def judge_node(facts: dict[str, Any], resolved: ResolvedJob, node: str) -> list[CheckResult]:
    """Every static check of one node that reported."""
    profile, gpus = resolved.preflight_thresholds, resolved.job.hardware.gpus_per_node
    own = {v.name: v.value for v in resolved.env if v.origin.startswith("environment.")}
    chosen = parse_hca_list(own.get("NCCL_IB_HCA"))
    results = [
        *judge_gpus(facts.get("gpu", {}), profile["gpu"], node=node, gpus_per_node=gpus),
        *judge_hcas(facts, profile["hca"], node=node, chosen=chosen),
    ]
    if profile["gpu"]["wanted"]:
        results += judge_gpu_health(facts["gpu"], profile["gpu"], node=node, gpus_per_node=gpus)
        results += judge_nvlink(facts["gpu"]["nvlink"], profile["gpu"], node=node, gpus_per_node=gpus)
        results += judge_xids(facts["kernel_log"], profile["gpu"], node=node)
        results += judge_driver(facts["versions"], facts["gpu"], node=node)
    return [
        *results,
        *judge_route(facts["route"], profile["net"], node=node),
        *judge_limits(facts["limits"], profile["limits"], node=node),
        judge_temporary(facts["temporary"], profile["limits"]["tmp_gib"], node=node, compiles=profile["gpu"]["wanted"]),
        *judge_paths(facts["paths"], resolved.job, node=node),
        *judge_versions(facts["versions"], node=node, ranges=profile["versions"]),
        *judge_environment(facts["environ"], resolved, node=node, torch=facts["versions"].get("torch")),
    ]
