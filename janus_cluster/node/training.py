"""Training of one attempt: run the ranks, find why they ended, and whether one more attempt may help."""

from __future__ import annotations

from dataclasses import replace

from janus_cluster.diagnosis.evidence import load_evidence
from janus_cluster.diagnosis.failure import classify
from janus_cluster.errors import JanusError, StoppedOnPurpose, TrainingFailed
from janus_cluster.node.batch_log import log_line
from janus_cluster.node.phases import Attempt
from janus_cluster.run.records.failure import FailureRecord
from janus_cluster.run.records.metrics import CompleteEvent, StopEvent, read_events
from janus_cluster.run.text import counted, load_secrets

# Faults that need not recur: outside the job, or gone with the processes. The gate checks the nodes once more.
TRANSIENT = frozenset({"signal", "hang", "network", "nccl_timeout", "xid", "file_system", "unknown"})

# What Slurm did to the job, by its messages in the batch log.
BY_SLURM = frozenset({"walltime", "preempted", "node_lost"})


def run_training(attempt: Attempt) -> None:
    """Run training to a successful end on every rank.

    Raises: StoppedOnPurpose after a stop at a step boundary, TrainingFailed with what is known and where the log is.
    """
    attempt.status.update(phase="training")
    resolved = attempt.resolved
    begins = f"on from step {attempt.ledger.from_step}" if attempt.ledger.from_step else "from step 0"
    log_line(
        f"training: {counted(resolved.world_size, 'rank')}, effective batch {resolved.effective_batch_size}, {begins}"
    )
    code = attempt.run_training_phase()
    if attempt.hang is not None:
        raise TrainingFailed(attempt.hang.message, kind="hang")
    stopped = _stop_event(attempt)
    if stopped is not None and code == 0:
        why = attempt.stop.name or "a signal to the ranks"
        raise StoppedOnPurpose(f"{why}: stopped after step {stopped.step}, which is saved", kind=attempt.stop.kind)
    if code and attempt.stop.first is not None:
        raise StoppedOnPurpose(f"{attempt.stop.name} ended training before it could be saved", kind=attempt.stop.kind)
    if attempt.was_overdue and _missing_completion(attempt) is None:
        return
    if not code and (missing := _missing_completion(attempt)) is not None:
        raise TrainingFailed(
            f"the ranks ended with exit code 0, but {missing}: one of them ended itself; "
            f"their logs are in {attempt.run.attempt_logs(attempt.number)}",
            kind="exception",
        )
    if code:
        logs = attempt.run.attempt_logs(attempt.number)
        raise TrainingFailed(f"training ended with exit code {code}; the ranks' logs are in {logs}")


def _missing_completion(attempt: Attempt) -> str | None:
    """What of a completed run is not there: its last record, or its export; None where all is."""
    is_complete, last = False, 0
    # Held one by one, as in _stop_event.
    for event in read_events(attempt.run):
        if event.attempt == attempt.number:
            is_complete = is_complete or isinstance(event, CompleteEvent)
            last = max(last, event.step or 0)
    if not is_complete:
        return f"training recorded no completion (last step: {last})"
    if attempt.resolved.job.checkpoint.export and not attempt.run.export.is_dir():
        return f"{attempt.run.export} is not there"
    return None


def _stop_event(attempt: Attempt) -> StopEvent | None:
    found = None
    # Held one by one: the lines of 100,000 steps are half a gigabyte of dictionaries.
    for event in read_events(attempt.run):
        if isinstance(event, StopEvent) and event.attempt == attempt.number:
            found = event
    return found


def find_failure(
    attempt: Attempt, error: JanusError, *, state: str = "FAILED", reason: str | None = None
) -> FailureRecord:
    """Why the attempt ended, from its error and its files: kept in attempt.json for the login node."""
    evidence = load_evidence(
        attempt.run,
        attempt=attempt.number,
        state=state,
        exit_code=error.exit_code,
        reason=reason or error.message,
        nodes=attempt.launcher.nodes,
        secrets=load_secrets(attempt.run),
        kind=error.kind,
    )
    found = classify(evidence) or FailureRecord(kind="unknown", message=error.message)
    return replace(found, hint=found.hint or error.hint, exit_code=error.exit_code)
