"""The gate: each node reads facts about itself, one judge gives the verdict, training trusts only a fresh one.

on every node    read_facts        measurements only; every verdict is made on node 0
on node 0        judge_static      per node and across nodes; a node without facts is FAIL
                 judge_cross_node  nodes against each other; judge_connections: the master port, clocks
                 judge_active      GEMM, the all-reduce in the node, each rail, all ranks, links, transport
                 require_fresh     the verdict is of this job, these nodes, this configuration
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from janus_cluster.errors import GateFailed, GateUndetermined
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.preflight.all_reduce import ProbeError, floor_of, judge_all_reduce
from janus_cluster.preflight.bandwidth import judge_counters, judge_gemm, judge_intra_node
from janus_cluster.preflight.cross_node import judge_connections, judge_cross_node
from janus_cluster.preflight.facts import read_facts
from janus_cluster.preflight.gpu_load import judge_gpu_load, loads_gpus
from janus_cluster.preflight.rails import judge_rails
from janus_cluster.preflight.rate import baseline_limits
from janus_cluster.preflight.static import judge_static
from janus_cluster.preflight.transport import judge_transport
from janus_cluster.run.records.rails import RailTest, without_doubles
from janus_cluster.run.records.verdict import CheckResult, Verdict, worst

__all__ = [
    "MAX_AGE_S",
    "ProbeContext",
    "build_verdict",
    "judge_active",
    "judge_connections",
    "judge_cross_node",
    "judge_static",
    "read_facts",
    "require_fresh",
]

MAX_AGE_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class ProbeContext:
    """Measurements taken around the probe.

    counters: node → port → by how much each rose, None where not read. nccl: node → facts of NCCL's own log, None
    without one. gpu_load: node → nvidia-smi's tables. evidence: other facts on the hosts, for a rail's message. errors:
    node → why its probe did not report.
    """

    counters: Mapping[str, Mapping[str, Mapping[str, int]] | None]
    nccl: Mapping[str, Mapping[str, Any] | None]
    gpu_load: Mapping[str, Sequence[Mapping[str, Any]] | None] = field(default_factory=dict)
    evidence: str = ""
    errors: Mapping[str, ProbeError | None] = field(default_factory=dict)


def judge_active(
    measured: Mapping[str, dict[str, Any] | None], resolved: ResolvedJob, context: ProbeContext | None = None
) -> list[CheckResult]:
    """The probe of every node: devices, rails, all ranks. Without `context` links and transport are not judged."""
    profile, nodes = resolved.preflight_thresholds, list(measured)
    own = profile["all_reduce"]
    floor = floor_of(
        own["busbw_gb_per_s"],
        nodes=resolved.job.nodes,
        gpus_per_node=resolved.processes_per_node,
        payload_bytes=round(float(resolved.job.preflight.all_reduce_mb or own["payload_mb"]) * 1e6),
    )
    present = {node: facts for node, facts in measured.items() if facts is not None}
    results = [
        judge_all_reduce(
            facts,
            node=node,
            world_size=resolved.world_size,
            floor=floor,
            more_limits=baseline_limits(profile, "all_reduce"),
            error=context.errors.get(node) if context else None,
        )
        for node, facts in measured.items()
    ]
    for node, facts in present.items():
        results += [judge_gemm(facts, profile, node=node), judge_intra_node(facts, profile, node=node)]
    if context is None or not present:
        return results
    deltas = {node: counters or {} for node, counters in context.counters.items()}
    rails = without_doubles(RailTest.from_json(test) for facts in present.values() for test in facts["rails"])
    results += judge_rails(rails, profile, nodes=nodes, deltas=deltas, evidence=context.evidence)
    for node in present:
        is_wanted = bool(profile["hca"]["wanted"])
        results.append(judge_counters(context.counters.get(node), node=node, is_wanted=is_wanted))
        if loads_gpus(resolved):
            gpus = resolved.job.hardware.gpus_per_node
            results += judge_gpu_load(context.gpu_load.get(node), profile["gpu"], node=node, gpus_per_node=gpus)
        results += judge_transport(context.nccl.get(node), profile["transport"], node=node, num_nodes=len(nodes))
    return results


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
