"""What a rehearsal proved: from its run folder to claims, each with its evidence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.attempt import AttemptRecord
from janus_cluster.run.records.metrics import Event, ResumeEvent, StopEvent, TrainEvent
from janus_cluster.run.records.verdict import Verdict
from janus_cluster.slurm.state import JobState


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim that a rehearsal is to prove, and its evidence."""

    name: str
    state: Literal["proven", "FAILED", "not proven"]
    evidence: str


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """The observations. Units: signalled_at and stop_seen_at are epoch seconds of this machine's clock."""

    records: Sequence[Event]
    total_steps: int
    is_gated: bool
    has_queue: bool
    state: JobState
    first_job_id: str
    job_id: str
    verdicts: Mapping[int, str] = field(default_factory=dict)
    # Attempt → when it ended, by the clock of its first node.
    ended_at: Mapping[int, float] = field(default_factory=dict)
    signalled_at: float | None = None
    stop_seen_at: float | None = None
    # The step of the newest whole checkpoint when the stop was seen.
    checkpoint_step: int | None = None

    @property
    def stop(self) -> StopEvent | None:
        """The record of the requested stop."""
        return next((r for r in self.records if isinstance(r, StopEvent)), None)

    @property
    def next_attempt(self) -> int | None:
        """The first attempt that trained after the stop."""
        if self.stop is None:
            return None
        later = (r.attempt or 0 for r in self.records if isinstance(r, (ResumeEvent, TrainEvent)))
        return min((number for number in later if number > (self.stop.attempt or 0)), default=None)

    def trained(self, *, attempt: int | None = None) -> list[TrainEvent]:
        """The records of steps: all, or those of one attempt."""
        return [r for r in self.records if isinstance(r, TrainEvent) and attempt in (None, r.attempt)]


def load_verdicts(run: RunDir) -> dict[int, str]:
    """Attempt → verdict of its gate, where there is one."""
    verdicts = {attempt: Verdict.load(run.verdict_json(attempt)) for attempt in run.attempts()}
    return {attempt: verdict.state for attempt, verdict in verdicts.items() if verdict is not None}


def load_ends(run: RunDir) -> dict[int, float]:
    """Attempt → when it ended, where that is recorded. Units: epoch seconds."""
    records = {attempt: AttemptRecord.load(run.attempt_json(attempt)) for attempt in run.attempts()}
    return {attempt: r.ended_at for attempt, r in records.items() if r is not None and r.ended_at is not None}


def judge_rehearsal(seen: Rehearsal) -> list[Claim]:
    """Every claim of a rehearsal, in the order of events."""
    return [
        _judge_gate(seen),
        _judge_stop(seen),
        _judge_checkpoint(seen),
        _judge_requeue(seen),
        _judge_first_step(seen),
        _judge_steps(seen),
        _judge_losses(seen),
        _judge_end(seen),
    ]


def _claim(name: str, holds: bool, evidence: str) -> Claim:
    return Claim(name=name, state="proven" if holds else "FAILED", evidence=evidence)


def _judge_gate(seen: Rehearsal) -> Claim:
    name = "the gate lets these nodes train"
    if not seen.is_gated:
        return Claim(name=name, state="not proven", evidence="it is switched off (preflight.enabled: false)")
    verdicts = ", ".join(f"attempt {attempt} {state}" for attempt, state in sorted(seen.verdicts.items()))
    good = bool(seen.verdicts) and set(seen.verdicts.values()) <= {"PASS", "WARN"}
    return _claim(name, good, verdicts or "no verdict was written")


def _judge_stop(seen: Rehearsal) -> Claim:
    name = "a stop signal ends training at a step boundary"
    if seen.stop is None:
        done = max((r.step or 0 for r in seen.trained()), default=0)
        missing = f"metrics.jsonl has no stop; {done} of {seen.total_steps} steps were trained"
        if seen.signalled_at is None:
            return _claim(name, False, f"it was not sent: {missing}")
        late = f"; it was sent too late, try --set training.max_steps={10 * done}" if done == seen.total_steps else ""
        return _claim(name, False, f"it was sent, but {missing}{late}")
    step, attempt = seen.stop.step or 0, seen.stop.attempt
    last = max((r.step or 0 for r in seen.trained(attempt=attempt)), default=0)
    return _claim(name, last == step, f"attempt {attempt} stopped at step {step}; its last trained step is {last}")


def _judge_checkpoint(seen: Rehearsal) -> Claim:
    name = "its checkpoint is whole"
    if seen.stop is None:
        return _claim(name, False, "there was no stop")
    step = seen.stop.step or 0
    if seen.checkpoint_step != step:
        found = f"checkpoint-{seen.checkpoint_step}" if seen.checkpoint_step is not None else "none"
        return _claim(name, False, f"checkpoint-{step} is not: the newest whole one is {found}")
    return _claim(name, True, f"checkpoint-{step}: every file of its manifest is there with its size")


def _judge_requeue(seen: Rehearsal) -> Claim:
    name = "Slurm requeues the job" if seen.has_queue else "the run continues when it is sent again"
    number = seen.next_attempt
    if number is None:
        return _claim(name, False, f"no attempt trained after the stop; the job is {_describe_state(seen.state)}")
    if not seen.has_queue:
        return _claim(name, True, f"attempt {number}, sent by resume: this machine has no queue")
    same = seen.job_id == seen.first_job_id
    return _claim(name, same, f"attempt {number} of job {seen.job_id}" + ("" if same else f", not {seen.first_job_id}"))


def _judge_first_step(seen: Rehearsal) -> Claim:
    name = "it continues at the exact next step"
    number = seen.next_attempt
    if seen.stop is None or number is None:
        return _claim(name, False, "it did not continue")
    stopped = seen.stop.step or 0
    resumed = next((r for r in seen.records if isinstance(r, ResumeEvent) and r.attempt == number), None)
    first = min((r.step or 0 for r in seen.trained(attempt=number)), default=None)
    origin = f"checkpoint-{resumed.step}" if resumed else "the beginning"
    holds = resumed is not None and resumed.step == stopped and first == stopped + 1
    return _claim(name, holds, f"attempt {number} began from {origin}; its first step is {first or 'none'}")


def _judge_steps(seen: Rehearsal) -> Claim:
    name = "no step is trained twice or left out"
    steps = [r.step or 0 for r in seen.trained()]
    twice = sorted({s for s in steps if steps.count(s) > 1})
    missing = [s for s in range(1, seen.total_steps + 1) if s not in steps]
    if not twice and not missing:
        return _claim(name, steps == sorted(steps), f"steps 1 to {seen.total_steps}, once each, in order")
    parts = [f"{label} {', '.join(map(str, found))}" for label, found in (("twice:", twice), ("missing:", missing))]
    return _claim(name, False, "; ".join(w for w, found in zip(parts, (twice, missing), strict=True) if found))


def _judge_losses(seen: Rehearsal) -> Claim:
    name = "every loss is finite"
    losses = [(r.step or 0, math.nan if r.loss is None else r.loss) for r in seen.trained()]
    bad = [f"step {step}: {loss}" for step, loss in losses if not math.isfinite(loss)]
    if bad or not losses:
        return _claim(name, False, "; ".join(bad) or "no step was trained")
    return _claim(
        name, True, f"{len(losses)} losses, {losses[0][1]:.4g} at step {losses[0][0]}, {losses[-1][1]:.4g} last"
    )


def _judge_end(seen: Rehearsal) -> Claim:
    return _claim("the job completes", seen.state.state == "COMPLETED", _describe_state(seen.state))


def _describe_state(state: JobState) -> str:
    code = f", exit code {state.exit_code}" if state.exit_code is not None else ""
    return f"{state.state}{code}" + (f": {state.reason}" if state.reason else "")


def render_times(seen: Rehearsal, *, stop_timeout_s: int) -> list[str]:
    """How long each observed part took. The last two are measured by the clocks of the nodes."""
    lines = []
    if seen.signalled_at is not None and seen.stop_seen_at is not None:
        took = seen.stop_seen_at - seen.signalled_at
        lines.append(f"{took:.1f} s from the signal to the checkpoint (restart.stop_timeout_s: {stop_timeout_s})")
    number = seen.next_attempt
    if seen.stop is None or number is None:
        return lines
    ended = seen.ended_at.get(seen.stop.attempt or 0)
    first = min((r.time for r in seen.trained(attempt=number) if r.time is not None), default=None)
    if ended is not None and first is not None:
        lines.append(f"{first - ended:.1f} s from the end of attempt {seen.stop.attempt} to the next step's end")
    own = [r.step_time_s for r in seen.trained() if r.step_time_s]
    if own:
        lines.append(f"{sorted(own)[len(own) // 2]:.2f} s a step, median of {len(own)}")
    return lines


def list_unproven(seen: Rehearsal, *, is_sandbox: bool) -> list[str]:
    """What such a rehearsal cannot prove, whatever it observes."""
    lines = [
        "that the loss is that of an uninterrupted run: there was none to compare with",
        "crashes, hangs and lost nodes: no fault was injected",
        "later steps: a longer sample may need more memory than these did",
    ]
    if not seen.has_queue:
        return ["Slurm: the queue, the requeue and its signals; --cluster sandbox or slurm rehearses them", *lines]
    lines.insert(0, "that Slurm's own signal before the walltime arrives in time: this one was sent by scancel")
    return [*(["the Slurm of your cluster: this one is the sandbox"] if is_sandbox else []), *lines]
