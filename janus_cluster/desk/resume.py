"""`janus-cluster resume`: sends the same run folder once more; training continues from its newest complete checkpoint.

With --nodes or --set it runs elsewhere or differently; amend.py decides what may change.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from janus_cluster.desk.amend import Amended, amend
from janus_cluster.desk.harvest import remember_bad_nodes
from janus_cluster.desk.send import Prepared, hand_over, require_cluster, run_locked
from janus_cluster.desk.settle import settle_submission
from janus_cluster.desk.submit import exclude_bad_nodes
from janus_cluster.errors import SlurmUnavailable, UsageError
from janus_cluster.job.home import site_dir
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.observe.status import add_card, collect_status
from janus_cluster.preflight.calibration import with_baseline
from janus_cluster.run.bundle import Bundles, bundles_added, render_bundles
from janus_cluster.run.checkpoints import CheckpointFound, find_newest_checkpoint
from janus_cluster.run.current import current_bundle
from janus_cluster.run.next_command import command_for, submit_command
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.bundle import ManifestRecord, load_resolved
from janus_cluster.run.records.submission import Cluster, load_submission
from janus_cluster.slurm.state import NO_SOURCE, JobState


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """Result of `resume`."""

    run: RunDir
    job_id: str
    cluster: Cluster
    checkpoint: CheckpointFound | None
    notes: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()


def resume(
    run: RunDir,
    *,
    environ: Mapping[str, str],
    nodes: int | None = None,
    sets: Sequence[str] = (),
    cwd: Path | None = None,
) -> Resumed:
    """Queue or start the run again in its own folder; without `nodes` and `sets` with its own script.

    Raises: UsageError while it is live, has completed, or cannot continue; SlurmUnavailable where that is unknown;
            SubmitFailed. In all of them the run folder is unchanged.
    """
    with run_locked(run):
        settle_submission(run)
        # Checked inside the lock: another resume could have sent it a moment ago.
        status = collect_status([run])[0]
        require_ended(status.state, run=run, may_have_completed=True)
        resolved = _load_resolved(run)
        amended = None
        has_moved = not _is_in_place(resolved, run)
        if nodes is not None or sets or has_moved:
            amended = amend(run, resolved, nodes=nodes, sets=sets, environ=environ, cwd=cwd or Path.cwd())
        # A run that has done all its steps continues only where it was given more of them.
        is_longer = amended is not None and amended.is_longer
        require_ended(status.state, run=run, may_have_completed=is_longer)
        _require_resumable(amended.resolved if amended else resolved, run)
        remember_bad_nodes(add_card(status))
        prepared = prepare(run, resolved, amended, environ=environ)
        job_id = hand_over(prepared, bundles_added(run, prepared.bundles))
    return Resumed(
        run=run,
        job_id=job_id,
        cluster=prepared.cluster,
        checkpoint=find_newest_checkpoint(run),
        notes=tuple(prepared.notes),
        changes=(
            *((f"run folder: moved here from {resolved.run_dir}",) if has_moved else ()),
            *(amended.changes if amended else ()),
        ),
    )


def _is_in_place(resolved: ResolvedJob, run: RunDir) -> bool:
    """Whether the folder is where its scripts expect it, under this name or by a link."""
    try:
        return Path(resolved.run_dir).samefile(run.path)
    except OSError:
        return False


def prepare(run: RunDir, resolved: ResolvedJob, amended: Amended | None, *, environ: Mapping[str, str]) -> Prepared:
    """Render the next bundles, where something was changed; else the last bundle is sent again.

    Raises: UsageError, SlurmUnavailable, SandboxFailed.
    """
    sent = load_submission(run)
    cluster: Cluster = sent.cluster if sent else resolved.cluster
    slurm_conf = require_cluster(cluster, environ, slurm_conf=sent.slurm_conf if sent else None)
    bundles: Bundles = {}
    if amended is not None:
        # What was submitted stays so: the code of the run folder is that of its first bundle.
        manifest = ManifestRecord.require(run.bundle(resolved.bundle).manifest_json, hint="resume it without options")
        resolved = with_baseline(amended.resolved, site_dir(environ))
        bundles = render_bundles(
            resolved,
            job_yaml_text=amended.job_yaml_text,
            secrets=amended.secrets,
            manifest=manifest,
            fewer_nodes=[with_baseline(each, site_dir(environ)) for each in amended.fewer_nodes],
        )
    elif not (script := run.bundle(resolved.bundle).job_sbatch).is_file():
        raise UsageError(f"{script} is not there", hint=submit_command(run))
    exclusion = exclude_bad_nodes(
        resolved.model_copy(update={"cluster": cluster}), slurm_conf=slurm_conf, site=site_dir(environ), now=time.time()
    )
    options = [f"--exclude={exclusion.option}"] if exclusion.added else []
    return Prepared(
        run=run,
        resolved=resolved,
        bundles=bundles,
        cluster=cluster,
        slurm_conf=slurm_conf,
        slurm_cluster=sent.slurm_cluster if sent else None,
        options=options,
        notes=exclusion.notes,
    )


def require_ended(state: JobState, *, run: RunDir, may_have_completed: bool = False) -> None:
    """Require that no job writes to the run. Raises: UsageError, SlurmUnavailable."""
    if state.state == "NOT_SUBMITTED":
        return
    if state.state == "COMPLETED" and not may_have_completed:
        raise UsageError(
            f"{run.name} has completed: there is nothing left to train",
            hint=f"--set training.max_steps=… makes it longer; a new run: {submit_command(run)}",
        )
    if state.source == NO_SOURCE or (state.reason or "").startswith("not confirmed"):
        raise SlurmUnavailable(
            f"{run.name} may still run: {state.reason}", hint=f"{command_for('status', run)}, once Slurm answers"
        )
    if not state.is_final and state.state != "UNKNOWN":
        raise UsageError(
            f"{run.name} is {state.state} (source: {state.source}): two jobs would write into one run folder",
            hint=f"{command_for('tail', run)} follows it; {command_for('cancel', run)} ends it first",
        )


def _require_resumable(resolved: ResolvedJob, run: RunDir) -> None:
    if resolved.job.kind == "train" and resolved.job.checkpoint.resume == "never":
        raise UsageError(
            f"{run.name} has checkpoint.resume: never: it would begin at step 0 over its own results",
            hint=f"{submit_command(run)} makes a run of its own",
        )


def _load_resolved(run: RunDir) -> ResolvedJob:
    bundle = current_bundle(run)
    try:
        return load_resolved(bundle)
    except (OSError, ValueError) as e:
        raise UsageError(
            f"{bundle.resolved_json} cannot be read by this version: {e}".split("\n", maxsplit=1)[0],
            hint=submit_command(run),
        ) from e


def resumed_to_json(done: Resumed) -> dict[str, Any]:
    """The contract of `resume --json`."""
    found = done.checkpoint
    return {
        "run_dir": str(done.run.path),
        "job_id": done.job_id,
        "cluster": done.cluster,
        "checkpoint": None if found is None else {"step": found.step, "path": str(found.path)},
        "changes": list(done.changes),
        "notes": list(done.notes),
    }


def describe_resumed(done: Resumed) -> str:
    """What was started again, from where, and what to type next."""
    found = done.checkpoint
    at = f"checkpoint-{found.step}" if found else "step 0: there is no complete checkpoint"
    rows = [("run folder", str(done.run.path)), ("resumes from", at)]
    rows += [*(("changed", line) for line in done.changes), *(("nodes", note) for note in done.notes)]
    rows += [("job id", done.job_id), ("next", command_for("tail", done.run))]
    return "\n".join(f"{label:<13} {text}" for label, text in rows)
