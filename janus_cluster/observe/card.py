"""The failure card: what failed first, where, the last good checkpoint, and what to type next."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from janus_cluster.config.schema import MemoryPlan
from janus_cluster.observe.checkpoints import CheckpointFound, find_newest_checkpoint
from janus_cluster.observe.evidence import load_evidence
from janus_cluster.observe.failure import Failure, classify
from janus_cluster.observe.text import clean_line, load_secrets
from janus_cluster.rundir import RunDir, read_json
from janus_cluster.slurm.recorded import load_status
from janus_cluster.slurm.state import JobState

# A message of pages (a CUDA error with all its advice) would push what to type next off the screen.
_MOST_MESSAGE_LINES = 4
_LONGEST_LINE = 300
_SET_OPTION = re.compile(r"--set '[^']+'|--set [\w.]+=[^\s;,]+")
# The fault was outside, or may not come again: the same run goes on as it is.
_SAME_AGAIN = frozenset({"preempted", "node_lost", "cancelled", "xid", "nccl_timeout", "hang", "network", "signal"})


@dataclass(frozen=True, kw_only=True)
class FailureCard:
    """One failed attempt. Units: ended_at epoch seconds."""

    failure: Failure
    checkpoint: CheckpointFound | None
    ended_at: float | None
    next_steps: tuple[str, ...]


def load_card(run: RunDir, state: JobState, *, ref: str) -> FailureCard | None:
    """The card of a run that ended badly; None for any other."""
    if not state.is_final or state.state == "COMPLETED":
        return None
    status = load_status(run)
    evidence = load_evidence(
        run,
        attempt=state.attempt,
        state=state.state,
        exit_code=state.exit_code,
        reason=state.reason,
        nodes=state.nodes,
        secrets=load_secrets(run),
    )
    failure = classify(evidence)
    if failure is None:
        return None
    checkpoint = find_newest_checkpoint(run)
    return FailureCard(
        failure=failure,
        checkpoint=checkpoint,
        ended_at=status.updated_at if status else None,
        next_steps=tuple(
            next_steps(
                failure,
                run=run,
                ref=ref,
                checkpoint=checkpoint,
                job=load_job(run),
                smaller=_load_smaller_option(run),
            )
        ),
    )


def render_card(card: FailureCard, *, instead_of_error: Sequence[str] = ()) -> list[str]:
    """The lines of the card, fit for a terminal. `instead_of_error` are lines that tell more than the error's words."""
    failure = card.failure
    rows = [("failed", f"{failure.title} [{failure.kind}]")]
    if failure.rank is not None or failure.node is not None:
        who = [f"rank {failure.rank}"] if failure.rank is not None else []
        rows.append(("first", " on ".join([*who, *([clean_line(failure.node)] if failure.node else [])])))
    message = "" if instead_of_error else failure.message or ""
    lines = [clean_line(line)[:_LONGEST_LINE] for line in message.split("\n") if line.strip()]
    rows += [("error" if i == 0 else "", line) for i, line in enumerate(lines[:_MOST_MESSAGE_LINES])]
    rows += [("frames" if i == 0 else "", frame[:_LONGEST_LINE]) for i, frame in enumerate(failure.frames)]
    rows += [("sample", clean_line(failure.path))] if failure.path else []
    rows.append(("checkpoint", _describe_checkpoint(card)))
    shown = [f"  {label + ':' if label else '':<12}{text}" for label, text in rows]
    return [shown[0], *instead_of_error, *shown[1:], *(f"  next: {clean_line(step)}" for step in card.next_steps)]


def card_to_json(card: FailureCard) -> dict[str, Any]:
    """The card as `status --json` has it."""
    failure, found = card.failure, card.checkpoint
    checkpoint = None if found is None else {"step": found.step, "path": str(found.path)}
    return {
        "kind": failure.kind,
        "title": failure.title,
        "rank": failure.rank,
        "node": failure.node,
        "message": failure.message,
        "frames": list(failure.frames),
        "path": failure.path,
        "checkpoint": checkpoint,
        "next": list(card.next_steps),
    }


def _describe_checkpoint(card: FailureCard) -> str:
    found = card.checkpoint
    if found is None:
        return "none that is complete: it would begin at step 0"
    ago = (card.ended_at or time.time()) - found.completed_at
    before = f", {ago / 60:.0f} min before the end" if ago >= 60 else ""
    return f"step {found.step}{before}: {clean_line(str(found.path))}"


def next_steps(
    failure: Failure,
    *,
    run: RunDir,
    ref: str,
    checkpoint: CheckpointFound | None,
    job: Mapping[str, Any],
    smaller: str | None = None,
) -> list[str]:
    """What a user would type now, the best first. `job` is the job as it was resolved; empty where it is not known.

    `smaller` are --set options for less memory that training.memory: auto has planned for this run.
    """
    at = f"goes on after step {checkpoint.step}" if checkpoint else "no complete checkpoint: begins at step 0"
    resume = f"janus-cluster resume {ref}   # {at}"
    submit = f"janus-cluster submit {shlex.quote(str(run.job_yaml))}"
    only = f" --rank {failure.rank}" if failure.rank is not None else ""
    look = f"janus-cluster tail {ref} --no-follow -n 100{only}"
    steps = {
        "walltime": [resume, f"janus-cluster resume {ref} --set slurm.time=…   # the same with more time"],
        "host_out_of_memory": [f"janus-cluster resume {ref} {_with_less_host_memory(job)}", look],
        "gpu_out_of_memory": [
            _go_on_smaller(job, smaller, resume=f"janus-cluster resume {ref}", at=at, submit=submit),
            look,
        ],
        "disk_full": [f"df -h {shlex.quote(str(run.path))}   # make room first", resume],
        "bad_data": _mend_data(failure, resume=resume, submit=submit),
        "loader": _mend_loader(failure, job, resume=f"janus-cluster resume {ref}", at=at, look=look),
        "bad_weights": [look, f"{submit} --set model.path=… --set model.vggt_path=…   # weights that are whole"],
        "diverged": [f"{submit} --set training.learning_rate=…   # a smaller one", look],
        "environment": [f"less {shlex.quote(str(run.batch_log))}", resume],
    }
    if failure.kind in ("preflight", "preflight_undetermined"):
        return []
    if failure.kind in _SAME_AGAIN:
        return [resume, look]
    return steps.get(failure.kind, [look, resume])


def _mend_data(failure: Failure, *, resume: str, submit: str) -> list[str]:
    """Data that was refused as a whole takes another job, one broken file takes mending."""
    if failure.hint is None or not (failure.message or "").startswith("UsageError"):
        return [f"mend or take away {failure.path or 'the sample'}, then: {resume}"]
    options = " ".join(_SET_OPTION.findall(failure.hint))
    return [*([f"{submit} {options}"] if options else []), failure.hint]


def _mend_loader(failure: Failure, job: Mapping[str, Any], *, resume: str, at: str, look: str) -> list[str]:
    """What takes away the cause: resumed as it is, the run would meet it again."""
    words, node = failure.message or "", failure.node or "the node"
    alone = f"{resume} --set data.num_workers=0   # the ranks read their frames themselves; {at}"
    if "AF_UNIX path too long" in words or "temporary directory" in words:
        return [f"{resume} --set environment.variables.TMPDIR=/tmp   # $TMPDIR cannot be used there; {at}", alone]
    if re.search(r"shared memory|No space left|bus error", words, re.IGNORECASE):
        return [f"df -h /dev/shm; ls -l /dev/shm   # on {node}: more room (in a container: --shm-size=64g)", alone]
    if "Killed" in words:
        return [f"{resume} {_with_less_host_memory(job)}", alone]
    return [alone, look]


def _with_less_host_memory(job: Mapping[str, Any]) -> str:
    """A --set option by which a rank gets more of the node's memory, or needs less."""
    asked, workers = (job.get("slurm") or {}).get("mem"), (job.get("data") or {}).get("num_workers")
    # A job that says nothing asks for all of it.
    if asked in (None, 0, "0") and isinstance(workers, int) and workers > 1:
        return f"--set data.num_workers={workers // 2}   # fewer loaders in memory"
    return "--set slurm.mem=0   # all of the node's memory"


def _go_on_smaller(job: Mapping[str, Any], smaller: str | None, *, resume: str, at: str, submit: str) -> str:
    """The line that needs less memory on the GPU; a new run only where frames have to go."""
    options = smaller or _smaller(job)
    if options is None:
        return f"{submit} --set data.history=…   # a new run with fewer frames; or more nodes"
    return f"{resume} {options}   # {at}"


def _smaller(job: Mapping[str, Any]) -> str | None:
    """--set options that need less memory on the GPU and keep the effective batch; None where there are none left."""
    training, deepspeed = job.get("training") or {}, job.get("deepspeed") or {}
    batch, accumulated = training.get("per_device_batch_size"), training.get("gradient_accumulation_steps")
    if isinstance(batch, int) and isinstance(accumulated, int) and batch > 1:
        factor = next(n for n in range(2, batch + 1) if batch % n == 0)
        return (
            f"--set training.per_device_batch_size={batch // factor} "
            f"--set training.gradient_accumulation_steps={accumulated * factor}"
        )
    if not training.get("gradient_checkpointing", True):
        return "--set training.gradient_checkpointing=true"
    if deepspeed.get("profile") != "zero3":
        return "--set deepspeed.profile=zero3"
    return None


def _load_smaller_option(run: RunDir) -> str | None:
    """The next option of training.memory: auto, as --set takes it; None where there is none."""
    try:
        return MemoryPlan.model_validate(read_json(run.resolved_json)["memory"]).next_as_options()
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_job(run: RunDir) -> dict[str, Any]:
    try:
        job = read_json(run.resolved_json)["job"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return job if isinstance(job, dict) else {}
