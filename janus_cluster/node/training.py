"""Training of one attempt: the ranks run, how they ended is told truthfully, and whether one more attempt may help."""

from __future__ import annotations

from typing import Any

from janus_cluster.errors import JanusError, StoppedOnPurpose, TrainingFailed
from janus_cluster.node.batch_log import say
from janus_cluster.node.phases import Attempt
from janus_cluster.observe.evidence import load_evidence
from janus_cluster.observe.failure import Failure, classify
from janus_cluster.observe.text import load_secrets

# Faults that need not come again: outside the job, or gone with the processes. The gate looks at the nodes once more.
TRANSIENT = frozenset({"signal", "hang", "network", "nccl_timeout", "xid", "unknown"})

# What Slurm did to the job, by its own words in the batch log.
BY_SLURM = frozenset({"walltime", "preempted", "node_lost"})


def run_training(attempt: Attempt) -> None:
    """Training has ended well on every rank.

    Raises: StoppedOnPurpose after a stop at a step boundary, TrainingFailed naming what is known and where the log is.
    """
    attempt.status.update(phase="training")
    resolved = attempt.resolved
    begins = f"on from step {attempt.ledger.from_step}" if attempt.ledger.from_step else "from step 0"
    say(f"training: {resolved.world_size} ranks, effective batch {resolved.effective_batch_size}, {begins}")
    code = attempt.run_training_phase()
    if attempt.hang is not None:
        raise TrainingFailed(attempt.hang.message)
    stopped = _stop_event(attempt)
    if stopped is not None and code == 0:
        why = attempt.stop.name or "a signal to the ranks"
        raise StoppedOnPurpose(f"{why}: stopped after step {stopped['step']}, which is saved")
    if code and attempt.stop.first is not None:
        raise StoppedOnPurpose(f"{attempt.stop.name} ended training before it could be saved")
    if code:
        logs = attempt.run.attempt_logs(attempt.number)
        raise TrainingFailed(f"training ended with exit code {code}; the ranks' logs are in {logs}")


def _stop_event(attempt: Attempt) -> dict[str, Any] | None:
    found = None
    # Held one by one: the lines of 100,000 steps are half a gigabyte of dictionaries.
    for event in attempt.run.read_metrics():
        if event.get("attempt") == attempt.number and event.get("kind") == "stop":
            found = event
    return found


def find_failure(attempt: Attempt, error: JanusError, *, state: str = "FAILED") -> Failure:
    """Why the attempt ended, from what it left behind: as the card at the desk says it."""
    evidence = load_evidence(
        attempt.run,
        attempt=attempt.number,
        state=state,
        exit_code=error.exit_code,
        reason=error.message,
        nodes=attempt.launcher.nodes,
        secrets=load_secrets(attempt.run),
    )
    return classify(evidence) or Failure(kind="unknown", message=error.message)


def describe_failure(failure: Failure) -> str:
    """One line: the class, who was first, and its words."""
    who = f"rank {failure.rank}" if failure.rank is not None else None
    place = " on ".join(part for part in (who, failure.node) if part)
    words = (failure.message or "").split("\n", maxsplit=1)[0]
    return ": ".join(part for part in (failure.title, place, words) if part)
