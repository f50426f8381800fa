"""Every claim of a rehearsal holds for a good run, and exactly the right ones fail for each bad one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from janus_cluster.desk.rehearsal import Rehearsal, judge_rehearsal, list_unproven, render_times
from janus_cluster.run.records.metrics import CheckpointEvent, Event, ResumeEvent, StopEvent, TrainEvent
from janus_cluster.slurm.state import JobState

GATE, STOP, CHECKPOINT = (
    "the gate lets these nodes train",
    "a stop signal ends training at a step boundary",
    "its checkpoint is whole",
)
ON, EXACT, ONCE = (
    "Slurm requeues the job",
    "it continues at the exact next step",
    "no step is trained twice or left out",
)
FINITE, END = "every loss is finite", "the job completes"


def train(step: int, attempt: int, loss: float = 2.5) -> TrainEvent:
    time = 1000.0 + step + 100 * attempt
    return TrainEvent(step=step, attempt=attempt, loss=loss, time=time, step_time_s=1.0)


def good() -> Rehearsal:
    """Stopped after step 3 of 6, gone on at step 4 by the same Slurm job."""
    return Rehearsal(
        records=[
            *(train(step, 1) for step in (1, 2, 3)),
            CheckpointEvent(step=3, attempt=1),
            StopEvent(step=3, attempt=1, checkpoint="/run/checkpoints/checkpoint-3"),
            ResumeEvent(step=3, attempt=2, checkpoint="/run/checkpoints/checkpoint-3"),
            *(train(step, 2) for step in (4, 5, 6)),
        ],
        total_steps=6,
        is_gated=True,
        has_queue=True,
        state=JobState(state="COMPLETED", source="status.json", exit_code=0, attempt=2),
        first_job_id="7",
        job_id="7",
        verdicts={1: "PASS", 2: "WARN"},
        ended_at={1: 1104.0, 2: 1210.0},
        signalled_at=50.0,
        stop_seen_at=62.5,
        checkpoint_step=3,
    )


def change(where: Callable[[Event], bool], **values: Any) -> Rehearsal:
    seen = good()
    return replace(seen, records=[replace(r, **values) if where(r) else r for r in seen.records])


def without(where: Callable[[Event], bool]) -> Rehearsal:
    seen = good()
    return replace(seen, records=[r for r in seen.records if not where(r)])


def test_a_good_rehearsal_proves_everything() -> None:
    claims = judge_rehearsal(good())
    assert [c.name for c in claims] == [GATE, STOP, CHECKPOINT, ON, EXACT, ONCE, FINITE, END]
    assert {c.state for c in claims} == {"proven"}
    reported = {c.name: c.evidence for c in claims}
    assert reported[GATE] == "attempt 1 PASS, attempt 2 WARN"
    assert reported[EXACT] == "attempt 2 began from checkpoint-3; its first step is 4"


FAILED = JobState(state="FAILED", source="status.json", exit_code=12, reason="training ended with exit code 1")
BAD: dict[str, tuple[Rehearsal, set[str]]] = {
    "the gate failed": (
        replace(good(), records=[], verdicts={1: "FAIL"}, state=FAILED, signalled_at=None, checkpoint_step=None),
        {GATE, STOP, CHECKPOINT, ON, EXACT, ONCE, FINITE, END},
    ),
    "no verdict": (replace(good(), verdicts={}), {GATE}),
    "the signal was too late": (
        replace(good(), records=[train(step, 1) for step in range(1, 7)], checkpoint_step=None),
        {STOP, CHECKPOINT, ON, EXACT},
    ),
    "one more step than was saved": (change(lambda r: r.KIND == "stop", step=2), {STOP, CHECKPOINT, EXACT}),
    "an older checkpoint": (replace(good(), checkpoint_step=2), {CHECKPOINT}),
    "no checkpoint": (replace(good(), checkpoint_step=None), {CHECKPOINT}),
    "not requeued": (
        replace(good(), records=good().records[:5], state=JobState(state="STOPPED", source="status.json")),
        {ON, EXACT, ONCE, END},
    ),
    "another job": (replace(good(), job_id="8"), {ON}),
    "from the beginning": (without(lambda r: r.KIND == "resume"), {EXACT}),
    "a step left out": (without(lambda r: r.step == 4), {EXACT, ONCE}),
    "a step twice": (replace(good(), records=[*good().records, train(5, 2)]), {ONCE}),
    "NaN": (change(lambda r: r.step == 5, loss=math.nan), {FINITE}),
    "broke after resuming": (replace(good(), state=FAILED), {END}),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_hold_is_named(case: str) -> None:
    seen, failing = BAD[case]
    assert {c.name for c in judge_rehearsal(seen) if c.state == "FAILED"} == failing


def test_a_gate_that_is_off_is_neither_proven_nor_failed() -> None:
    claim = judge_rehearsal(replace(good(), is_gated=False, verdicts={}))[0]
    assert (claim.name, claim.state) == (GATE, "not proven")


def test_a_signal_that_was_too_late_names_what_to_try() -> None:
    late = replace(good(), records=[train(step, 1) for step in range(1, 7)])
    reported = {c.name: c.evidence for c in judge_rehearsal(late)}
    assert "--set training.max_steps=60" in reported[STOP]


def test_times_are_printed_as_far_as_they_are_known() -> None:
    lines = render_times(good(), stop_timeout_s=240)
    assert lines[0].startswith("12.5 s from the signal to the checkpoint")
    assert lines[1].startswith("100.0 s from the end of attempt 1")
    assert lines[2].startswith("1.00 s a step")
    assert render_times(replace(good(), records=[], signalled_at=None), stop_timeout_s=240) == []


def test_what_a_rehearsal_cannot_prove_is_listed() -> None:
    assert any("sandbox" in line for line in list_unproven(good(), is_sandbox=True))
    here = list_unproven(replace(good(), has_queue=False), is_sandbox=False)
    assert here[0].startswith("Slurm: the queue")
