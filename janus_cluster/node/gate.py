"""The gate of one attempt: runs every phase on all nodes, judges between them, writes the verdict."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from janus_cluster.node.batch_log import log_line
from janus_cluster.node.phases import Attempt
from janus_cluster.node.probe_errors import load_probe_error
from janus_cluster.node.retry import Retry, retry_without_bad_nodes
from janus_cluster.preflight.bandwidth import counter_deltas
from janus_cluster.preflight.cross_node import describe_loopback
from janus_cluster.preflight.gate import (
    ProbeContext,
    build_verdict,
    judge_active,
    judge_connections,
    judge_cross_node,
    judge_static,
    require_fresh,
)
from janus_cluster.preflight.report import render_summary, render_verdict_markdown
from janus_cluster.preflight.transport import read_nccl_logs
from janus_cluster.preflight.unwritten import judge_unwritten, read_unwritten
from janus_cluster.run.files import write_text_atomically
from janus_cluster.run.records.gate import AllReduceRecord, ConnectRecord, CountersRecord, FactsRecord, NodeReport
from janus_cluster.run.records.verdict import CheckResult, Verdict

# A file that another node has just written may need this long to be seen: 60 s is the longest that NFS caches a
# missing name (acdirmax). It is waited for only after a phase that succeeded.
_VISIBILITY_S = 65.0


def run_gate(attempt: Attempt) -> None:
    """Write the verdict; returns when training may begin. Raises: GateFailed, GateUndetermined.

    A phase that failed is the last: the other nodes would only wait for the bad one. So is one that could not be
    judged: where nvidia-smi hangs, CUDA does too.
    """
    results: list[CheckResult] = []
    for phase in (check_nodes, check_connections, check_speed):
        results += phase(attempt)
        if any(r.state in ("FAIL", "ERROR") for r in results):
            break
    verdict = write_verdict(attempt, results)
    for line in render_summary(verdict, details=str(attempt.run.verdict_md(attempt.number))):
        log_line(line)
    again = Verdict.require(attempt.run.verdict_json(attempt.number))
    launcher = attempt.launcher
    require_fresh(again, attempt.resolved, nodes=launcher.nodes, job_id=launcher.job_id, now=time.time())


def check_nodes(attempt: Attempt) -> list[CheckResult]:
    """Read every node's facts, judge every static check and the nodes against each other, record the rails."""
    run, number = attempt.run, attempt.number
    code = attempt.run_phase("facts", timeout_s=attempt.gate_timeout_s, end_together=False)
    wait_s = 0 if code else _VISIBILITY_S
    facts = _values(attempt.read_reports(FactsRecord, lambda n: run.facts_json(number, n), wait_s=wait_s))
    attempt.write_rails(facts)
    silent = [node for node, report in facts.items() if report is None]
    unwritten = read_unwritten(run.batch_log, attempt=number) if silent else {}
    return [
        *judge_static(facts, attempt.resolved),
        *judge_cross_node(facts),
        *judge_unwritten(unwritten, silent=silent),
    ]


def check_connections(attempt: Attempt) -> list[CheckResult]:
    """Judge whether every node reached node 0 on the master port, and was reached back. Nothing for a single node."""
    run, number = attempt.run, attempt.number
    if len(attempt.launcher.nodes) < 2:
        return []
    code = attempt.run_phase("connect", timeout_s=attempt.gate_timeout_s, end_together=False)
    wait_s = 0 if code else _VISIBILITY_S
    reports = attempt.read_reports(ConnectRecord, lambda n: run.connect_json(number, n), wait_s=wait_s)
    attempt.connections = _values(reports)
    return judge_connections(
        attempt.connections,
        address=attempt.launcher.master_addr(),
        port=attempt.port,
        clock_warn_s=attempt.resolved.preflight_thresholds["clock"]["warn_above_s"],
    )


def check_speed(attempt: Attempt) -> list[CheckResult]:
    """Measure devices, rails and the all-reduce, between two readings of the error counters."""
    run, number = attempt.run, attempt.number
    code = attempt.run_phase("all_reduce", timeout_s=attempt.gate_timeout_s, end_together=True)
    wait_s = 0 if code else _VISIBILITY_S
    measured = _values(attempt.read_reports(AllReduceRecord, lambda n: run.all_reduce_json(number, n), wait_s=wait_s))
    counters = attempt.read_reports(CountersRecord, lambda n: run.counters_json(number, n), wait_s=wait_s)
    around = ProbeContext(
        counters={n: counter_deltas(c.before, c.after) if c else None for n, c in counters.items()},
        gpu_load={n: c.gpu_load if c else None for n, c in counters.items()},
        nccl={n: read_nccl_logs(run.nccl_logs(number, n)) for n in attempt.launcher.nodes},
        evidence=describe_loopback(attempt.connections),
        errors={n: load_probe_error(run, attempt=number, node=n) for n, facts in measured.items() if facts is None},
    )
    return judge_active(measured, attempt.resolved, around)


def _values(reports: Mapping[str, NodeReport | None]) -> dict[str, dict[str, Any] | None]:
    return {node: None if report is None else dict(report.values) for node, report in reports.items()}


def queue_again_without_bad_nodes(attempt: Attempt) -> Retry:
    """Requeue the job without the nodes that the verdict excludes, if preflight.on_fail and the verdict allow it."""
    verdict = Verdict.require(attempt.run.verdict_json(attempt.number))
    retry = retry_without_bad_nodes(attempt.run, attempt.resolved, attempt.launcher, verdict, attempt=attempt.number)
    log_line(f"preflight: {retry.message}")
    return retry


def write_verdict(attempt: Attempt, results: Sequence[CheckResult]) -> Verdict:
    """Write the verdict of all nodes and of each node into the run folder."""
    run, launcher = attempt.run, attempt.launcher
    verdict = build_verdict(results, attempt.resolved, nodes=launcher.nodes, job_id=launcher.job_id, now=time.time())
    for node in launcher.nodes:
        verdict.of_node(node).write(run.node_verdict_json(attempt.number, node))
    write_text_atomically(run.verdict_md(attempt.number), render_verdict_markdown(verdict))
    verdict.write(run.verdict_json(attempt.number))
    return verdict
