"""`janus-cluster resume`: the same run folder, sent once more; training goes on from its newest complete checkpoint.

With --nodes or --set it goes on elsewhere or otherwise; what may change, and what follows from it, says amend.py.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from janus_cluster.amend import Amended, amend
from janus_cluster.config.home import site_dir
from janus_cluster.config.schema import ResolvedJob
from janus_cluster.errors import SlurmUnavailable, UsageError
from janus_cluster.observe.checkpoints import CheckpointFound, find_newest_checkpoint
from janus_cluster.observe.harvest import remember_bad_nodes
from janus_cluster.observe.status import add_card, collect_status
from janus_cluster.preflight.calibration import with_baseline
from janus_cluster.render.bundle import bundle_replaced, restore_interrupted
from janus_cluster.rundir import RunDir
from janus_cluster.send import Cluster, run_locked, send, signals_held
from janus_cluster.slurm.recorded import load_submission
from janus_cluster.slurm.state import NOBODY, JobState
from janus_cluster.submit import exclude_bad_nodes, sandbox_conf


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """What became of it."""

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
    """The run is queued or running again, in its own folder; without `nodes` and `sets` with its own script.

    Raises: UsageError while it is live, has completed, or cannot go on; SlurmUnavailable when nobody knows;
            SubmitFailed. In all of them the run folder holds what it held.
    """
    resolved = _load_resolved(run)
    with run_locked(run):
        # Asked inside the lock: another resume could have sent it a moment ago.
        status = collect_status([run])[0]
        require_ended(status.state, run=run, ref=status.ref, may_have_completed=True)
        if restore_interrupted(run):
            resolved = _load_resolved(run)
        amended = None
        if nodes is not None or sets:
            amended = amend(run, resolved, nodes=nodes, sets=sets, environ=environ, cwd=cwd or Path.cwd())
            resolved = with_baseline(amended.resolved, site_dir(environ))
        # A run that has done all its steps goes on only where it was given more of them.
        is_longer = amended is not None and amended.is_longer
        require_ended(status.state, run=run, ref=status.ref, may_have_completed=is_longer)
        _require_resumable(resolved, run)
        remember_bad_nodes(add_card(status))
        sent = load_submission(run)
        cluster: Cluster = sent.cluster if sent else resolved.cluster
        slurm_conf = sandbox_conf(environ) if cluster == "sandbox" else sent.slurm_conf if sent else None
        if cluster != "local":
            from janus_cluster.slurm.executor import require_slurm

            require_slurm(slurm_conf)
        exclusion = exclude_bad_nodes(
            resolved.model_copy(update={"cluster": cluster}),
            slurm_conf=slurm_conf,
            site=site_dir(environ),
            now=time.time(),
        )
        options = [f"--exclude={exclusion.option}"] if exclusion.added else []
        with signals_held("the job is being handed over") as came:
            with _bundle_of(amended, resolved):
                job_id = send(run, cluster, slurm_conf=slurm_conf, options=options)
            if came:
                print(f"submitted as job {job_id} all the same; janus-cluster cancel {job_id} ends it", file=sys.stderr)
    return Resumed(
        run=run,
        job_id=job_id,
        cluster=cluster,
        checkpoint=find_newest_checkpoint(run),
        notes=exclusion.notes,
        changes=amended.changes if amended else (),
    )


def _bundle_of(amended: Amended | None, resolved: ResolvedJob) -> contextlib.AbstractContextManager[None]:
    """The run folder holds the job as it goes on; nothing is written where nothing was changed."""
    if amended is None:
        return contextlib.nullcontext()
    return bundle_replaced(resolved, job_yaml_text=amended.job_yaml_text, secrets=amended.secrets)


def require_ended(state: JobState, *, run: RunDir, ref: str, may_have_completed: bool = False) -> None:
    """Nothing, for a run that nobody writes to. Raises: UsageError, SlurmUnavailable."""
    if state.state == "NOT_SUBMITTED":
        return
    if state.state == "COMPLETED" and not may_have_completed:
        raise UsageError(
            f"{run.name} has completed: there is nothing to go on with",
            hint=f"--set training.max_steps=… makes it longer; janus-cluster submit {run.job_yaml} begins anew",
        )
    if state.source == NOBODY or (state.reason or "").startswith("not confirmed"):
        raise SlurmUnavailable(
            f"{run.name} may still run: {state.reason}", hint=f"janus-cluster status {ref}, once Slurm answers"
        )
    if not state.is_final and state.state != "UNKNOWN":
        raise UsageError(
            f"{run.name} is {state.state} (says {state.source}): two jobs would write into one run folder",
            hint=f"janus-cluster tail {ref} follows it; janus-cluster cancel {ref} ends it first",
        )


def _require_resumable(resolved: ResolvedJob, run: RunDir) -> None:
    if resolved.job.kind == "train" and resolved.job.checkpoint.resume == "never":
        raise UsageError(
            f"{run.name} has checkpoint.resume: never: it would begin at step 0 over its own results",
            hint=f"janus-cluster submit {run.job_yaml} makes a run of its own",
        )
    if not run.job_sbatch.is_file():
        raise UsageError(f"{run.path} holds no {run.job_sbatch.name}: it is no run folder of ours, or was emptied")


def _load_resolved(run: RunDir) -> ResolvedJob:
    try:
        return ResolvedJob.load(run.resolved_json.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UsageError(
            f"{run.resolved_json} cannot be read by this version: {e}".split("\n", maxsplit=1)[0],
            hint=f"janus-cluster submit {run.job_yaml}",
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
    """What runs again, from where, and what to type next."""
    found = done.checkpoint
    at = f"checkpoint-{found.step}" if found else "step 0: there is no complete checkpoint"
    rows = [("run folder", str(done.run.path)), ("goes on from", at)]
    rows += [*(("changed", line) for line in done.changes), *(("nodes", note) for note in done.notes)]
    rows += [("job id", done.job_id), ("next", f"janus-cluster tail {done.job_id}")]
    return "\n".join(f"{label:<13} {text}" for label, text in rows)
