"""The gate of one attempt: every phase on all nodes, judged between them; the verdict lies in the run folder."""

from __future__ import annotations

import time
from collections.abc import Sequence

from janus_cluster.node.batch_log import say
from janus_cluster.node.phases import Attempt
from janus_cluster.node.retry import retry_without_bad_nodes
from janus_cluster.preflight.bandwidth import counter_deltas
from janus_cluster.preflight.cross_node import describe_loopback
from janus_cluster.preflight.gate import (
    Surroundings,
    build_verdict,
    judge_active,
    judge_connections,
    judge_cross_node,
    judge_static,
    require_fresh,
)
from janus_cluster.preflight.model import CheckResult, Verdict
from janus_cluster.preflight.report import render_summary, render_verdict_markdown
from janus_cluster.preflight.transport import read_nccl_logs
from janus_cluster.preflight.unwritten import judge_unwritten, read_unwritten
from janus_cluster.rundir import read_json, write_json_atomically, write_text_atomically

# A file that another node has just written may need this long to be seen: 60 s is the longest that NFS's caches of
# names keep that there was none (acdirmax). It is waited for only after a phase that says that it went well.
_VISIBILITY_S = 65.0


def run_gate(attempt: Attempt) -> None:
    """The verdict is written and training may begin. Raises: GateFailed, GateUndetermined.

    A phase that failed is the last: a node that is known to be bad would only make the others wait for it. So is one
    that could not be judged: where nvidia-smi hangs, CUDA does too.
    """
    results: list[CheckResult] = []
    for phase in (check_nodes, check_connections, check_speed):
        results += phase(attempt)
        if any(r.state in ("FAIL", "ERROR") for r in results):
            break
    verdict = write_verdict(attempt, results)
    for line in render_summary(verdict, details=str(attempt.run.verdict_md(attempt.number))):
        say(line)
    again = Verdict.from_json(read_json(attempt.run.verdict_json(attempt.number)))
    launcher = attempt.launcher
    require_fresh(again, attempt.resolved, nodes=launcher.nodes, job_id=launcher.job_id, now=time.time())


def check_nodes(attempt: Attempt) -> list[CheckResult]:
    """Each node told what it is; every static check, and the nodes against each other. The rails are written down."""
    run, number = attempt.run, attempt.number
    code = attempt.run_phase("facts", timeout_s=attempt.gate_timeout_s, end_together=False)
    facts = attempt.read_reports(lambda n: run.facts_json(number, n), wait_s=0 if code else _VISIBILITY_S)
    attempt.write_rails(facts)
    silent = [node for node, told in facts.items() if told is None]
    unwritten = read_unwritten(run.batch_log, attempt=number) if silent else {}
    return [
        *judge_static(facts, attempt.resolved),
        *judge_cross_node(facts),
        *judge_unwritten(unwritten, silent=silent),
    ]


def check_connections(attempt: Attempt) -> list[CheckResult]:
    """Every node reached node 0 on the master port, and was reached back. Nothing for a single node."""
    run, number = attempt.run, attempt.number
    if len(attempt.launcher.nodes) < 2:
        return []
    code = attempt.run_phase("connect", timeout_s=attempt.gate_timeout_s, end_together=False)
    attempt.connections = attempt.read_reports(
        lambda n: run.connect_json(number, n), wait_s=0 if code else _VISIBILITY_S
    )
    return judge_connections(
        attempt.connections,
        address=attempt.launcher.master_addr(),
        port=attempt.port,
        clock_warn_s=attempt.resolved.preflight_thresholds["clock"]["warn_above_s"],
    )


def check_speed(attempt: Attempt) -> list[CheckResult]:
    """Devices, rails and the all-reduce were measured, between two readings of the error counters."""
    run, number = attempt.run, attempt.number
    code = attempt.run_phase("all_reduce", timeout_s=attempt.gate_timeout_s, end_together=True)
    wait_s = 0 if code else _VISIBILITY_S
    measured = attempt.read_reports(lambda n: run.all_reduce_json(number, n), wait_s=wait_s)
    counters = attempt.read_reports(lambda n: run.counters_json(number, n), wait_s=wait_s)
    around = Surroundings(
        counters={n: c and counter_deltas(c["before"], c["after"]) for n, c in counters.items()},
        gpu_load={n: c.get("gpu_load") if c else None for n, c in counters.items()},
        nccl={n: read_nccl_logs(run.nccl_logs(number, n)) for n in attempt.launcher.nodes},
        evidence=describe_loopback(attempt.connections),
    )
    return judge_active(measured, attempt.resolved, around)


def queue_again_without_bad_nodes(attempt: Attempt) -> tuple[bool, str | None]:
    """(whether the job is in the queue again, what became of the wish in words; None where nobody wished it)."""
    verdict = Verdict.from_json(read_json(attempt.run.verdict_json(attempt.number)))
    is_queued, words = retry_without_bad_nodes(
        attempt.run, attempt.resolved, attempt.launcher, verdict, attempt=attempt.number
    )
    say(f"preflight: {words}")
    return is_queued, words if attempt.resolved.job.preflight.on_fail != "stop" else None


def write_verdict(attempt: Attempt, results: Sequence[CheckResult]) -> Verdict:
    """The verdict of all nodes and of each node lies in the run folder."""
    run, launcher = attempt.run, attempt.launcher
    verdict = build_verdict(results, attempt.resolved, nodes=launcher.nodes, job_id=launcher.job_id, now=time.time())
    for node in launcher.nodes:
        write_json_atomically(run.node_verdict_json(attempt.number, node), verdict.of_node(node).to_json())
    write_text_atomically(run.verdict_md(attempt.number), render_verdict_markdown(verdict))
    write_json_atomically(run.verdict_json(attempt.number), verdict.to_json())
    return verdict
