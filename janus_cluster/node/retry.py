"""preflight.on_fail: exclude-and-retry: one more try without the node that the gate blames."""

from __future__ import annotations

import time
from collections.abc import Sequence

from janus_cluster.config.schema import ResolvedJob
from janus_cluster.errors import JanusError
from janus_cluster.node.steps import Launcher
from janus_cluster.preflight.model import Verdict
from janus_cluster.rundir import RunDir, write_json_atomically


def retry_without_bad_nodes(
    run: RunDir, resolved: ResolvedJob, launcher: Launcher, verdict: Verdict, *, attempt: int
) -> tuple[bool, str]:
    """(whether the job is queued again, why or why not in words). At most once per run folder: retry.json remembers.

    The own exclusions of the job are kept. A pair of nodes that nobody can be blamed for is not tried again.
    """
    bad = verdict.exclude
    refusal = _refusal(run, resolved, bad, verdict)
    if refusal is not None:
        return False, refusal
    own = [n for n in (resolved.sbatch_options.get("exclude") or "").split(",") if n]
    record = {"schema_version": 1, "attempt": attempt, "exclude": list(bad), "reason": verdict.summary()}
    # Written first: once the job is requeued this process may be ended at any moment.
    write_json_atomically(run.retry_json, record | {"requeued_at": time.time()})
    try:
        reason = launcher.requeue_without([*own, *bad])
    except JanusError as e:
        reason = e.message
    if reason is not None:
        write_json_atomically(run.retry_json, record | {"requeued_at": None, "not_retried": reason})
        return False, f"not tried again without {', '.join(bad)}: {reason}"
    return True, f"queued again without {', '.join(bad)}"


def _refusal(run: RunDir, resolved: ResolvedJob, bad: Sequence[str], verdict: Verdict) -> str | None:
    if resolved.job.preflight.on_fail != "exclude-and-retry":
        return "preflight.on_fail: stop"
    if run.retry_json.exists():
        return "not tried again: it was once already"
    if not bad:
        every = {r.node for r in verdict.results if r.state == "FAIL"} >= set(verdict.nodes)
        blame = "every node failed, so the fault is the job's or the site's" if every else "no single node is to blame"
        return f"not tried again: {blame}"
    if len(bad) == len(verdict.nodes) > 1:
        return "not tried again: every node failed, so the fault is the job's or the site's"
    return None
