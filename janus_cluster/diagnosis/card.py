"""The failure card: what failed first, where, the last good checkpoint, and what to type next."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from janus_cluster.diagnosis.evidence import load_evidence
from janus_cluster.diagnosis.failure import SLURM_STATES, classify
from janus_cluster.job.resolved import MemoryPlan
from janus_cluster.job.walltime import parse_walltime_min
from janus_cluster.run.checkpoints import CheckpointFound, find_newest_checkpoint
from janus_cluster.run.current import load_current
from janus_cluster.run.next_command import command_for, submit_command
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.attempt import AttemptRecord
from janus_cluster.run.records.bundle import ResolvedRecord
from janus_cluster.run.records.failure import LONGEST_LINE, FailureRecord
from janus_cluster.run.records.submission import load_status
from janus_cluster.run.text import clean_line, load_secrets
from janus_cluster.run.times import render_duration
from janus_cluster.slurm.state import JobState

# A message of pages (a CUDA error with all its advice) would push what to type next off the screen.
_MOST_MESSAGE_LINES = 4
_SET_OPTION = re.compile(r"--set '[^']+'|--set [\w.]+=[^\s;,]+")
# The fault was outside, or need not recur: the same run can be resumed unchanged.
_SAME_AGAIN = frozenset(
    {"preempted", "node_lost", "cancelled", "xid", "nccl_timeout", "hang", "network", "signal", "file_system"}
)


@dataclass(frozen=True, kw_only=True)
class FailureCard:
    """One failed attempt. Units: ended_at epoch seconds."""

    failure: FailureRecord
    checkpoint: CheckpointFound | None
    ended_at: float | None
    next_steps: tuple[str, ...]


def load_card(run: RunDir, state: JobState) -> FailureCard | None:
    """The card of a run that ended badly; None for any other."""
    if not state.is_final or state.state == "COMPLETED":
        return None
    failure = load_failure(run, state)
    if failure is None:
        return None
    status, checkpoint = load_status(run), find_newest_checkpoint(run)
    return FailureCard(
        failure=failure,
        checkpoint=checkpoint,
        ended_at=status.updated_at if status else None,
        next_steps=tuple(next_steps(failure, run=run, checkpoint=checkpoint, resolved=load_current(run))),
    )


def load_failure(run: RunDir, state: JobState) -> FailureRecord | None:
    """The failure as the attempt recorded it; classified here only where no attempt could: a lost or killed one.

    Also where the node found no cause: another node's file may have become visible since.
    """
    record = AttemptRecord.load(run.attempt_json(state.attempt)) if state.attempt is not None else None
    stored = record.failure if record else None
    if record and stored and stored.kind != "unknown":
        # What Slurm did after the attempt's last record, only Slurm knows.
        is_by_slurm = SLURM_STATES.get(state.state, stored.kind) != stored.kind
        if not is_by_slurm and (state.state != "CANCELLED" or record.state == "CANCELLED"):
            return stored
    evidence = load_evidence(
        run,
        attempt=state.attempt,
        state=state.state,
        exit_code=state.exit_code,
        reason=state.reason,
        nodes=state.nodes,
        secrets=load_secrets(run),
    )
    return classify(evidence)


def render_card(card: FailureCard, *, instead_of_error: Sequence[str] = ()) -> list[str]:
    """The card's lines, sanitised for a terminal. `instead_of_error`: lines with more than the error's message."""
    failure = card.failure
    rows = [("failed", f"{failure.title} [{failure.kind}]")]
    if failure.rank is not None or failure.node is not None:
        who = [f"rank {failure.rank}"] if failure.rank is not None else []
        rows.append(("first", " on ".join([*who, *([clean_line(failure.node)] if failure.node else [])])))
    message = "" if instead_of_error else failure.message or ""
    lines = [clean_line(line)[:LONGEST_LINE] for line in message.split("\n") if line.strip()]
    rows += [("error" if i == 0 else "", line) for i, line in enumerate(lines[:_MOST_MESSAGE_LINES])]
    rows += [("frames" if i == 0 else "", frame[:LONGEST_LINE]) for i, frame in enumerate(failure.frames)]
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
    before = f", {render_duration(ago)} before the end" if ago >= 60 else ""
    return f"step {found.step}{before}: {clean_line(str(found.path))}"


def next_steps(
    failure: FailureRecord,
    *,
    run: RunDir,
    checkpoint: CheckpointFound | None,
    resolved: ResolvedRecord,
) -> list[str]:
    """What to type next, the best first. `resolved` is empty where the run's job is not known."""
    at = f"goes on after step {checkpoint.step}" if checkpoint else "no complete checkpoint: begins at step 0"
    again = command_for("resume", run)
    resume = f"{again}   # {at}"
    submit = submit_command(run)
    only = f" --rank {failure.rank}" if failure.rank is not None else ""
    look = command_for("tail", run, f"--no-follow -n 100{only}")
    read_log = f"less {shlex.quote(str(run.batch_log))}"
    steps = {
        "walltime": [resume, f"{again} --set slurm.time={_twice_the_time(resolved)}   # the same with more time"],
        "host_out_of_memory": [f"{again} {_with_less_host_memory(resolved)}", look],
        "gpu_out_of_memory": [
            _go_on_smaller(resolved, resume=again, at=at, submit=submit),
            look,
        ],
        "disk_full": [f"df -h {shlex.quote(str(run.path))}   # make room first", resume],
        "read_only": [
            f"findmnt -T {shlex.quote(str(run.path))}   # why does it take no writes?",
            resume,
        ],
        "bad_data": _fix_data(failure, resume=resume, submit=submit),
        "loader": _fix_loader(failure, resolved, resume=again, at=at, look=look),
        "bad_weights": [look, f"{submit} --set model.path=… --set model.vggt_path=…   # weights that are whole"],
        "diverged": [f"{submit} --set training.learning_rate={_half_the_rate(resolved)}   # a smaller one", look],
        "launch": [read_log, f"{resume}   # once that is corrected; other options: --set slurm.…"],
        "environment": [read_log, resume],
    }
    if failure.kind in ("preflight", "preflight_undetermined"):
        return []
    # The error names what to look at on the node: resumed unchanged, the run would meet it again.
    advice = [failure.hint] if failure.hint and failure.kind in ("network", "xid", "environment", "signal") else []
    if failure.kind in _SAME_AGAIN:
        return [*advice, resume, look]
    if "environment.setup" in (failure.message or ""):
        key = "environment.setup_each_node" if "setup_each_node" in str(failure.message) else "environment.setup"
        return [*advice, read_log, f"{again} --set '{key}=[…]'   # with the corrected lines; {at}"]
    if advice:
        return [*advice, resume]
    return steps.get(failure.kind, [look, resume])


def _fix_data(failure: FailureRecord, *, resume: str, submit: str) -> list[str]:
    """Data that was refused as a whole needs another job; one broken file can be repaired."""
    if failure.hint is None or failure.error_type != "UsageError":
        return [f"repair or remove {failure.path or 'the sample'}, then: {resume}"]
    options = " ".join(_SET_OPTION.findall(failure.hint))
    return [*([f"{submit} {options}"] if options else []), failure.hint]


def _fix_loader(failure: FailureRecord, resolved: ResolvedRecord, *, resume: str, at: str, look: str) -> list[str]:
    """Commands that remove the cause: resumed unchanged, the run would meet it again."""
    message, node = failure.message or "", failure.node or "the node"
    alone = f"{resume} --set data.num_workers=0   # the ranks read their frames themselves; {at}"
    if "AF_UNIX path too long" in message or "temporary directory" in message:
        return [f"{resume} --set environment.variables.TMPDIR=/tmp   # $TMPDIR cannot be used there; {at}", alone]
    if re.search(r"shared memory|No space left|bus error", message, re.IGNORECASE):
        return [f"df -h /dev/shm; ls -l /dev/shm   # on {node}: more room (in a container: --shm-size=64g)", alone]
    if "Killed" in message:
        return [f"{resume} {_with_less_host_memory(resolved)}", alone]
    return [alone, look]


def _twice_the_time(resolved: ResolvedRecord) -> str:
    """Twice the job's time limit, as sbatch takes it; two days where it has none that is known."""
    try:
        limit_min = parse_walltime_min(str(resolved.value("slurm.time")))
    except ValueError:
        limit_min = None
    days, minutes = divmod(2 * limit_min if limit_min else 2 * 24 * 60, 24 * 60)
    hours, minutes = divmod(minutes, 60)
    return f"{days}-{hours:02}:{minutes:02}:00" if days else f"{hours:02}:{minutes:02}:00"


def _half_the_rate(resolved: ResolvedRecord) -> str:
    rate = resolved.value("training.learning_rate")
    return f"{rate / 2:g}" if isinstance(rate, float) else "1e-5"


def _with_less_host_memory(resolved: ResolvedRecord) -> str:
    """A --set option that gives a rank more of the node's memory, or lets it need less."""
    asked, workers = resolved.value("slurm.mem"), resolved.value("data.num_workers")
    # A job that sets none asks for all of it.
    if asked in (None, 0, "0") and isinstance(workers, int) and workers > 1:
        return f"--set data.num_workers={workers // 2}   # fewer loaders in memory"
    return "--set slurm.mem=0   # all of the node's memory"


def _go_on_smaller(resolved: ResolvedRecord, *, resume: str, at: str, submit: str) -> str:
    """The command that needs less memory on the GPU; a new run only where frames have to be dropped."""
    options = _planned_smaller(resolved) or _smaller(resolved)
    if options is None:
        history = resolved.value("data.history")
        fewer = history // 2 if isinstance(history, int) else 0
        return f"{submit} --set data.history={fewer}   # a new run with fewer frames; or more nodes"
    return f"{resume} {options}   # {at}"


def _planned_smaller(resolved: ResolvedRecord) -> str | None:
    """The next option of training.memory: auto, as --set takes it; None where there is none."""
    try:
        return MemoryPlan.model_validate(resolved.memory).next_as_options()
    except ValueError:
        return None


def _smaller(resolved: ResolvedRecord) -> str | None:
    """--set options that need less memory on the GPU at the same effective batch; None where there are none left."""
    batch = resolved.value("training.per_device_batch_size")
    accumulated = resolved.value("training.gradient_accumulation_steps")
    if isinstance(batch, int) and isinstance(accumulated, int) and batch > 1:
        factor = next(n for n in range(2, batch + 1) if batch % n == 0)
        return (
            f"--set training.per_device_batch_size={batch // factor} "
            f"--set training.gradient_accumulation_steps={accumulated * factor}"
        )
    if resolved.value("training.gradient_checkpointing") is False:
        return "--set training.gradient_checkpointing=true"
    if resolved.value("deepspeed.profile") != "zero3":
        return "--set deepspeed.profile=zero3"
    return None
