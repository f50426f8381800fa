"""Which bundle a run is at. The desk asks here; an attempt is given a number, and follows the recorded fallbacks.

The last attempt of the newest submission decides: the bundle that it recorded as the next one, else its own. Before the
first attempt it is the submitted bundle.
"""

from __future__ import annotations

from dataclasses import dataclass

from janus_cluster.errors import UsageError
from janus_cluster.run.next_command import submit_command
from janus_cluster.run.paths import BundleDir, RunDir
from janus_cluster.run.records.attempt import AttemptRecord
from janus_cluster.run.records.bundle import ResolvedRecord
from janus_cluster.run.records.submission import SubmissionRecord


@dataclass(frozen=True)
class BundleChoice:
    """The bundle that an attempt runs; `because`: the reason, where it is a fallback of one that ran out of memory."""

    bundle: int
    because: str | None = None


def current_bundle(run: RunDir) -> BundleDir:
    """The bundle that the run is at."""
    sent = SubmissionRecord.load(run.submission_json)
    begun_before = sent.attempts_before if sent else 0
    for attempt in reversed([n for n in run.attempts() if n > begun_before]):
        record = AttemptRecord.load(run.attempt_json(attempt))
        if record is not None and record.bundle is not None:
            return run.bundle(record.fallback.bundle if record.fallback else record.bundle)
    return run.bundle((sent.bundle if sent else None) or 1)


def follow_fallbacks(run: RunDir, submitted: int) -> BundleChoice:
    """The bundle to which the submitted one has led so far, as attempts recorded it.

    A requeued job.sbatch still names the bundle that it was submitted with.
    """
    records = [AttemptRecord.load(run.attempt_json(attempt)) for attempt in run.attempts()]
    fallbacks = {r.bundle: r.fallback for r in records if r is not None and r.fallback is not None}
    number = submitted
    # Only ever to a higher number, even with a damaged record.
    while (following := fallbacks.get(number)) is not None and following.bundle > number:
        number = following.bundle
    return BundleChoice(number, next((f.because for f in fallbacks.values() if f.bundle == number), None))


def load_current(run: RunDir) -> ResolvedRecord:
    """resolved.json of the bundle that the run is at; an empty record where it cannot be read."""
    return ResolvedRecord.load(current_bundle(run).resolved_json) or ResolvedRecord()


def has_bundles(run: RunDir) -> bool:
    """False for a run folder that janus-cluster 0.1 made."""
    return run.bundles.is_dir()


def require_bundles(run: RunDir) -> None:
    """Nothing, for a run folder that this version can read. Raises: UsageError."""
    if not has_bundles(run):
        raise UsageError(
            f"{run.path} was made by janus-cluster 0.1 (it has no bundles/), and this version cannot read it",
            hint=f"use the version that made it; or for a new run: {submit_command(run)}",
        )
