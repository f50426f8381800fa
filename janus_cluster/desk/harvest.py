"""Find bad nodes in runs that ended: those that failed the gate, broke under a run, or were lost."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

from janus_cluster.desk.bad_nodes import NodeRecord, remember_nodes
from janus_cluster.diagnosis.evidence import read_tail
from janus_cluster.errors import JanusError
from janus_cluster.observe.find import list_readable_runs
from janus_cluster.observe.slow import load_health, throttled_gpus
from janus_cluster.observe.status import RunStatus, add_card, collect_status
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.attempt import AttemptRecord
from janus_cluster.run.records.submission import load_status, load_submission
from janus_cluster.run.records.verdict import Verdict
from janus_cluster.run.text import clean_line
from janus_cluster.slurm.commands import parse_time

# As srun and slurmstepd of Slurm 22.05 write them, and as node.attempt begins.
_NODE_FAILURE = re.compile(r"srun: error: Node failure on ([\w.-]+)$")
_CANCELLED_AT = re.compile(r"CANCELLED AT (\S+) DUE TO NODE FAILURE")
_ATTEMPT_BEGINS = re.compile(r"attempt (\d+) of ")
# `submit` looks back over this many of the newest runs.
_RECENT_RUNS = 20
# Checks of the machine itself. A path or a package that is missing everywhere is the job's fault, not the nodes'.
_HARDWARE = ("gpu", "hca", "net.links", "rail", "remapped_rows", "ecc", "gemm", "intra_node", "link_errors")


def remember_bad_nodes(status: RunStatus) -> list[NodeRecord]:
    """Record the nodes that this ended run blames. Returns: the new records.

    Where the records cannot be written, the status of the run is shown nevertheless.
    """
    try:
        return remember_nodes(blamed_nodes(status), now=time.time())
    except (JanusError, OSError):
        return []


def remember_recent(runs_dir: Path) -> None:
    """Record the bad nodes of the newest runs of the folder."""
    runs = [run for run in list_readable_runs([runs_dir])[:_RECENT_RUNS] if _may_blame(run)]
    for status in collect_status(runs) if runs else []:
        remember_bad_nodes(add_card(status))


def _may_blame(run: RunDir) -> bool:
    sent, status = load_submission(run), load_status(run)
    is_good = status is not None and status.state == "COMPLETED" and len(run.attempts()) < 2
    is_good = is_good and not any(run.health_files(attempt) for attempt in run.attempts())
    return sent is not None and sent.cluster != "local" and not is_good


def blamed_nodes(status: RunStatus) -> list[NodeRecord]:
    """Records of the nodes that the run's attempts blame; none for a run on this machine, or a fault of the job.

    Every attempt's gate counts: one that failed may have been queued again, and succeeded, without the bad node.
    """
    run, sent = status.run, load_submission(status.run)
    if sent is None or sent.cluster == "local":
        return []
    records = [record for attempt in run.attempts() for record in _refused_nodes(run, attempt, sent.cluster)]
    records += _broken_nodes(run, sent.cluster)
    records += _lost_nodes(run, sent.cluster)
    known = {record.key for record in records}
    records += [record for record in _throttled_nodes(run, sent.cluster) if record.key not in known]
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


def _broken_nodes(run: RunDir, cluster: str) -> list[NodeRecord]:
    """Nodes blamed by a failure that an attempt recorded; a later attempt may have succeeded."""
    found = []
    for record in (AttemptRecord.load(run.attempt_json(attempt)) for attempt in run.attempts()):
        if record and (failure := record.failure) and failure.node and failure.blames_node:
            found.append(
                NodeRecord(
                    node=failure.node,
                    cluster=cluster,
                    kind=failure.kind,
                    reason=clean_line(failure.message or failure.title),
                    time=record.ended_at or _changed_at(run),
                    run=run.name,
                    attempt=record.attempt,
                )
            )
    return found


def _throttled_nodes(run: RunDir, cluster: str) -> list[NodeRecord]:
    """Nodes with a GPU that the hardware slowed down for half of an attempt; the run itself may have succeeded."""
    return [
        NodeRecord(node=node, cluster=cluster, kind="gpu_throttle", reason=text, time=at, run=run.name, attempt=attempt)
        for attempt in run.attempts()
        for node, (at, text) in throttled_gpus(load_health(run, attempt)).items()
    ]


def _lost_nodes(run: RunDir, cluster: str) -> list[NodeRecord]:
    """Nodes that srun reported as failed. Slurm requeues such a job at once: it has no end to judge."""
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
    """The nodes that failed the gate of one attempt. Where all nodes failed, only a hardware fault is a node's own."""
    if (verdict := Verdict.load(run.verdict_json(attempt))) is None:
        return []
    nodes, exclude = {*verdict.nodes}, {*verdict.exclude}
    failed = [r for r in verdict.results if r.state == "FAIL" and r.node in exclude]
    if exclude == nodes:
        failed = [r for r in failed if r.id.startswith(_HARDWARE)]
        if len(nodes) > 1 and {r.node for r in failed} == nodes:
            return []
    reasons: dict[str, str] = {}
    for r in failed:
        reasons.setdefault(r.node, clean_line(f"{r.id}: {r.measured}"))
    return [
        NodeRecord(
            node=node,
            cluster=cluster,
            kind="preflight",
            reason=text,
            time=verdict.created_at,
            run=run.name,
            attempt=attempt,
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
