"""From runs that ended to the memory of bad nodes: who failed the gate, broke under a run, or was lost."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

from janus_cluster.errors import JanusError
from janus_cluster.observe.evidence import read_tail
from janus_cluster.observe.find import list_runs
from janus_cluster.observe.status import RunStatus, add_card, collect_status
from janus_cluster.observe.text import clean_line
from janus_cluster.rundir import RunDir, read_json
from janus_cluster.site.nodes import NodeRecord, remember_nodes
from janus_cluster.slurm.commands import parse_time
from janus_cluster.slurm.recorded import load_status, load_submission

# As srun and slurmstepd of Slurm 22.05 write them, and as node.attempt begins.
_NODE_FAILURE = re.compile(r"srun: error: Node failure on ([\w.-]+)$")
_CANCELLED_AT = re.compile(r"CANCELLED AT (\S+) DUE TO NODE FAILURE")
_ATTEMPT_BEGINS = re.compile(r"attempt (\d+) of ")
# `submit` looks back over this many of the newest runs.
_RECENT_RUNS = 20
# Checks of the machine itself. A path or a package that is missing everywhere is the job's fault, not the nodes'.
_HARDWARE = ("gpu", "hca", "net.links", "rail", "remapped_rows", "ecc", "gemm", "intra_node", "link_errors")


def remember_bad_nodes(status: RunStatus) -> list[NodeRecord]:
    """Nodes that this ended run blames are in the site's memory. Returns: those that are new there.

    A memory that cannot be written is no reason to hide the status of a run.
    """
    try:
        return remember_nodes(blamed_nodes(status), now=time.time())
    except (JanusError, OSError):
        return []


def remember_recent(runs_dir: Path) -> None:
    """What the newest runs of the folder teach is in the site's memory."""
    runs = [run for run in list_runs([runs_dir])[:_RECENT_RUNS] if _may_teach(run)]
    for status in collect_status(runs) if runs else []:
        remember_bad_nodes(add_card(status))


def _may_teach(run: RunDir) -> bool:
    sent, status = load_submission(run), load_status(run)
    is_good = status is not None and status.state == "COMPLETED" and len(run.attempts()) < 2
    return sent is not None and sent.cluster != "local" and not is_good


def blamed_nodes(status: RunStatus) -> list[NodeRecord]:
    """The records that the run's attempts ask for; none for a run on this machine, or whose fault was the job's own.

    Every attempt's gate counts: one that was refused may have been queued again, and gone well, without the bad node.
    """
    run, sent = status.run, load_submission(status.run)
    if sent is None or sent.cluster == "local":
        return []
    records = [record for attempt in run.attempts() for record in _refused_nodes(run, attempt, sent.cluster)]
    records += _lost_nodes(run, sent.cluster)
    if status.card is None or not status.card.failure.blames_node:
        return records
    failure = status.card.failure
    broken = NodeRecord(
        node=failure.node or "",
        cluster=sent.cluster,
        kind=failure.kind,
        reason=clean_line(failure.message or failure.title),
        time=status.card.ended_at or _changed_at(run),
        run=run.name,
        attempt=status.state.attempt,
    )
    return records if broken.key in {r.key for r in records} else [*records, broken]


def _lost_nodes(run: RunDir, cluster: str) -> list[NodeRecord]:
    """Nodes that srun reported as failed. Slurm queues such a job again at once: there is no end to judge."""
    found: dict[tuple[str, int | None], NodeRecord] = {}
    attempt, when = None, _changed_at(run)
    for line in read_tail(run.batch_log, secrets={}).split("\n"):
        if begun := _ATTEMPT_BEGINS.match(line):
            attempt = int(begun[1])
        elif (lost := _NODE_FAILURE.match(line)) and (lost[1], attempt) not in found:
            found[lost[1], attempt] = NodeRecord(
                node=lost[1], cluster=cluster, kind="node_lost", reason=line, time=when, run=run.name, attempt=attempt
            )
        elif (ended := _CANCELLED_AT.search(line)) and (at := parse_time(ended[1])) is not None:
            found = {k: replace(r, time=at) if k[1] == attempt else r for k, r in found.items()}
    return list(found.values())


def _refused_nodes(run: RunDir, attempt: int, cluster: str) -> list[NodeRecord]:
    """Who failed the gate of one attempt. Where all nodes failed, only a fault of hardware is a node's own."""
    try:
        verdict = read_json(run.verdict_json(attempt))
        nodes, exclude = {str(n) for n in verdict["nodes"]}, {str(n) for n in verdict["exclude"]}
        failed = [r for r in verdict["results"] if r["state"] == "FAIL" and r["node"] in exclude]
        told = [(str(r["node"]), str(r["id"]), clean_line(f"{r['id']}: {r['measured']}")) for r in failed]
        judged_at = float(verdict["created_at"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
    if exclude == nodes:
        told = [t for t in told if t[1].startswith(_HARDWARE)]
        if len(nodes) > 1 and {t[0] for t in told} == nodes:
            return []
    reasons: dict[str, str] = {}
    for node, _, text in told:
        reasons.setdefault(node, text)
    return [
        NodeRecord(
            node=node, cluster=cluster, kind="preflight", reason=text, time=judged_at, run=run.name, attempt=attempt
        )
        for node, text in reasons.items()
    ]


def _changed_at(run: RunDir) -> float:
    for path in (run.status_json, run.submission_json):
        try:
            return path.stat().st_mtime
        except OSError:
            continue
    return time.time()
