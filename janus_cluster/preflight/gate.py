"""The gate: each node reads facts about itself, one judge gives the verdict, training trusts only a fresh one.

on every node    read_facts        nothing is judged, so nothing can be talked out of a verdict
on node 0        judge_static      per node and across nodes; a node without facts is FAIL
                 judge_active      the all-reduce over all ranks
                 require_fresh     the verdict is of this job, these nodes, this configuration
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from janus_cluster.config.schema import ResolvedJob
from janus_cluster.errors import GateFailed, GateUndetermined
from janus_cluster.preflight.all_reduce import judge_all_reduce
from janus_cluster.preflight.gpu import judge_gpus, read_gpus
from janus_cluster.preflight.hca import judge_hcas, read_hcas
from janus_cluster.preflight.model import CheckResult, Verdict, worst
from janus_cluster.preflight.paths import judge_paths, read_paths, wanted_paths
from janus_cluster.preflight.versions import judge_same_versions, judge_versions, read_versions

MAX_AGE_S = 3600.0


def read_facts(resolved: ResolvedJob, *, node: str) -> dict[str, Any]:
    """What this node is, without a judgement. Seconds; nothing is written and nothing leaves the node."""
    begun = time.monotonic()
    facts: dict[str, Any] = {
        "schema_version": 1,
        "node": node,
        "hostname": socket.gethostname(),
        "config_hash": resolved.config_hash,
        "time": time.time(),
        "paths": read_paths(wanted_paths(resolved), Path(resolved.run_dir)),
        "versions": read_versions(),
        "gpus": read_gpus(),
        "hcas": read_hcas(),
    }
    facts["duration_s"] = time.monotonic() - begun
    return facts


def judge_static(facts_by_node: Mapping[str, dict[str, Any] | None], resolved: ResolvedJob) -> list[CheckResult]:
    """Every static and cross-node check of every node; a node that did not report is FAIL."""
    results: list[CheckResult] = []
    for node, facts in facts_by_node.items():
        reported = facts is not None and facts["config_hash"] == resolved.config_hash
        results.append(
            CheckResult(
                id="reported",
                phase="static",
                node=node,
                state="PASS" if reported else "FAIL",
                measured=f"as {facts['hostname']}" if reported and facts else "no facts for this job from this node",
                expected="facts within preflight.timeout_s",
                threshold_source="preflight.timeout_s",
                fix="" if reported else f"is {node} up? see logs/batch.log and the node's log of this attempt",
            )
        )
        if reported and facts is not None:
            results += _judge_node(facts, resolved, node)
    present = {node: facts["versions"] for node, facts in facts_by_node.items() if facts is not None}
    if len(present) > 1:
        results += judge_same_versions(present)
    return results


def _judge_node(facts: dict[str, Any], resolved: ResolvedJob, node: str) -> list[CheckResult]:
    job, profile = resolved.job, resolved.preflight_thresholds
    return [
        *judge_paths(facts["paths"], node=node, min_free_gb=job.preflight.min_free_gb),
        *judge_versions(facts["versions"], node=node, python_min=profile["versions"]["python_min"]),
        *judge_gpus(facts["gpus"], profile["gpu"], node=node, gpus_per_node=job.hardware.gpus_per_node),
        *judge_hcas(facts["hcas"], profile["hca"], node=node),
    ]


def judge_active(measured: Mapping[str, dict[str, Any] | None], resolved: ResolvedJob) -> list[CheckResult]:
    """The all-reduce of every node against the floor for this number of nodes."""
    floor = resolved.preflight_thresholds["all_reduce"]["busbw_gb_per_s"][str(resolved.job.nodes)]
    return [
        judge_all_reduce(
            facts,
            node=node,
            world_size=resolved.world_size,
            floor_gb_per_s=floor["fail_below"],
            source=floor["source"],
        )
        for node, facts in measured.items()
    ]


def build_verdict(
    results: Sequence[CheckResult], resolved: ResolvedJob, *, nodes: Sequence[str], job_id: str | None, now: float
) -> Verdict:
    """The worst result wins; no result at all is ERROR."""
    return Verdict(
        state=worst([r.state for r in results]),
        job_id=job_id,
        config_hash=resolved.config_hash,
        nodes=tuple(nodes),
        created_at=now,
        results=tuple(results),
    )


def require_fresh(
    verdict: Verdict, resolved: ResolvedJob, *, nodes: Sequence[str], job_id: str | None, now: float
) -> None:
    """Nothing happens for a PASS or WARN of this very job; everything else ends the attempt.

    Raises: GateFailed for FAIL, GateUndetermined for ERROR, SKIP, or a verdict of another job, node list,
            configuration or time.
    """
    stale = [
        what
        for what, is_other in (
            (f"job {verdict.job_id}", verdict.job_id != job_id),
            (f"nodes {','.join(verdict.nodes)}", verdict.nodes != tuple(nodes)),
            ("another configuration", verdict.config_hash != resolved.config_hash),
            (f"{now - verdict.created_at:.0f} s ago", not -60 <= now - verdict.created_at <= MAX_AGE_S),
        )
        if is_other
    ]
    if stale:
        raise GateUndetermined(f"the preflight verdict is of {', '.join(stale)}: not of this attempt")
    if verdict.state == "FAIL":
        raise GateFailed(verdict.summary(), hint=f"--exclude={','.join(verdict.exclude)}" if verdict.exclude else None)
    if verdict.state not in ("PASS", "WARN"):
        raise GateUndetermined(verdict.summary())
