"""preflight.on_fail: exclude-and-retry: one more attempt without the node that the gate blames."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from janus_cluster.errors import JanusError
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.node.steps import Launcher
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.submission import RetryRecord
from janus_cluster.run.records.verdict import Verdict
from janus_cluster.slurm.commands import parse_hostlist


@dataclass(frozen=True)
class Retry:
    """Whether the job is in the queue again, and why or why not."""

    is_queued: bool
    message: str


def retry_without_bad_nodes(
    run: RunDir, resolved: ResolvedJob, launcher: Launcher, verdict: Verdict, *, attempt: int
) -> Retry:
    """Requeue the job without the blamed nodes, at most once per run folder (retry.json).

    The job's own exclusions are kept. It is not requeued for a pair of nodes of which neither can be blamed alone.
    """
    bad = verdict.exclude
    refusal = _refusal(run, resolved, bad, verdict)
    if refusal is not None:
        return Retry(False, refusal)
    if launcher.is_ended_by_slurm():
        return Retry(False, "not tried again: the job was cancelled")
    own = parse_hostlist(resolved.sbatch_options.get("exclude") or "")
    record = RetryRecord(attempt=attempt, exclude=bad, reason=verdict.summary(), requeued_at=time.time())
    # Written first: once the job is requeued this process may be ended at any moment.
    record.write(run.retry_json)
    try:
        reason = launcher.requeue_without([*own, *bad])
    except JanusError as e:
        reason = e.message
    if reason is not None:
        replace(record, requeued_at=None, not_retried=reason).write(run.retry_json)
        return Retry(False, f"not tried again without {', '.join(bad)}: {reason}")
    return Retry(True, f"queued again without {', '.join(bad)}")


def _refusal(run: RunDir, resolved: ResolvedJob, bad: Sequence[str], verdict: Verdict) -> str | None:
    if resolved.job.preflight.on_fail != "exclude-and-retry":
        return "preflight.on_fail: stop"
    if run.retry_json.exists():
        return "not tried again: that was done once already"
    if not bad:
        every = {r.node for r in verdict.results if r.state == "FAIL"} >= set(verdict.nodes)
        blame = "every node failed, so the fault is the job's or the site's" if every else "no single node is to blame"
        return f"not tried again: {blame}"
    if len(bad) == len(verdict.nodes) > 1:
        return "not tried again: every node failed, so the fault is the job's or the site's"
    return None
