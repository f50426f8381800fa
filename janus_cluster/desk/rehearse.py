"""`janus-cluster submit --rehearse`: a few real steps of the job, stopped on purpose, which must resume exactly there.

Only the job is short; script, gate, data, model and queue are those of the real run.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from janus_cluster.desk.rehearsal import (
    Claim,
    Rehearsal,
    judge_rehearsal,
    list_unproven,
    load_ends,
    load_verdicts,
    render_times,
)
from janus_cluster.desk.resume import resume
from janus_cluster.desk.submit import Request, Submission, load_request, submit
from janus_cluster.errors import JanusError, RehearsalFailed, UsageError
from janus_cluster.job.schema import JobConfig
from janus_cluster.job.walltime import parse_walltime_min
from janus_cluster.run.checkpoints import find_newest_checkpoint
from janus_cluster.run.local_process import is_local_job
from janus_cluster.run.next_command import command_for
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.metrics import Event, StopEvent, TrainEvent, read_events
from janus_cluster.run.records.submission import load_submission
from janus_cluster.run.times import render_duration
from janus_cluster.slurm.commands import Slurm
from janus_cluster.slurm.state import JobState, load_job_states, slurm_of

SUFFIX = "-rehearsal"
_MAX_STEPS = 6
# A tiny model takes a tenth of a second for a step: six would be over before the signal arrives.
_MAX_STEPS_OF_TINY = 40
# The signal is sent when this step is in metrics.jsonl: the first one also contains one-time loading.
_SIGNAL_AFTER_STEP = 2
# A step to be signalled in, one to stop after, one to resume with.
_FEWEST_STEPS = _SIGNAL_AFTER_STEP + 2
# Six steps of the slowest known runs (78 s), twice the gate and the loading of weights; a short job is backfilled.
_WALLTIME_MIN = 60
_LONGEST_NAME = 64

_LOOK_S = 0.3
# Every query of Slurm is an RPC to a controller that others use.
_ASK_S = {"slurm": 10.0, "sandbox": 1.0, "local": 0.5}
# NFS may show an old metrics.jsonl for some seconds after the job's end.
_SETTLE_S = {"slurm": 30.0, "sandbox": 3.0, "local": 1.0}
_LONGEST_WAIT_S = 24 * 3600.0
_LONGEST_SILENCE_S = 3600.0
_NUDGES = 20
# Started again in the second of its requeue, slurmd takes the job for the one that it has just killed, and it fails.
_SETTLED_S = 5.0

Log = Callable[[str], None]


def rehearse(request: Request, *, environ: Mapping[str, str], cwd: Path, log: Log) -> tuple[Submission, list[Claim]]:
    """Run the rehearsal and return its claims with evidence. `log` is called with a line for every event.

    Raises: UsageError for a job that cannot be rehearsed, RehearsalFailed where it takes too long; as submit does.
    """
    short = shorten(request, environ)
    done = submit(short, environ=environ, cwd=cwd)
    watch = Watch(done, log)
    log(f"rehearsal: job {done.job_id}, {watch.total_steps} steps, in {done.run.path}")
    if done.resolved.memory is not None:
        from janus_cluster.plan.auto import describe_memory

        log(f"memory: {describe_memory(done.resolved.memory)[0]}")
    try:
        seen = _stop_and_go_on(watch, environ)
    except KeyboardInterrupt:
        log("\nthe rehearsal is no longer watched; its job goes on: it was not proven that it continues")
        log(f"next: {command_for('status', done.run)}, or {command_for('cancel', done.run)}")
        raise
    claims = judge_rehearsal(seen)
    _report(seen, claims, done, log)
    return done, claims


def shorten(request: Request, environ: Mapping[str, str]) -> Request:
    """The request for a few steps of the same job, under a name of its own.

    The user's --set override the length. Raises: UsageError for a job that cannot be rehearsed.
    """
    given = load_request(request, environ).config
    _refuse(given)
    length = _MAX_STEPS_OF_TINY if given.model.preset == "tiny" else _MAX_STEPS
    lengths = [f"training.max_steps={length}", *_shorter_walltime(given)]
    sets = [*lengths, *request.sets]
    steps = load_request(replace(request, sets=sets), environ).config.training.max_steps or length
    if steps < _FEWEST_STEPS:
        raise UsageError(
            f"training.max_steps: {steps}: a rehearsal is stopped after step {_SIGNAL_AFTER_STEP} and must continue; "
            f"allowed: {_FEWEST_STEPS} or more"
        )
    sets += [
        "training.logging_steps=1",
        "training.evaluate_every_steps=null",
        "data.validation_fraction=0",
        # Checkpoints otherwise at the end only: any earlier one was written because of the stop.
        f"checkpoint.every_steps={steps}",
        "checkpoint.keep_last=2",
        "checkpoint.export=false",
    ]
    name = given.name[: _LONGEST_NAME - len(SUFFIX)] + SUFFIX
    return replace(request, sets=sets, name=name, dry_run=False)


def _refuse(job: JobConfig) -> None:
    """Raises: UsageError for a job that would not continue after a stop."""
    if job.kind != "train":
        raise UsageError(
            f"kind: {job.kind}: only training can be rehearsed", hint="janus-cluster preflight runs the gate"
        )
    for key, value, wanted in (
        ("restart.on_stop", job.restart.on_stop, "requeue"),
        ("checkpoint.resume", job.checkpoint.resume, "auto"),
    ):
        if value != wanted:
            raise UsageError(
                f"{key}: {value}: this job would not continue after a stop, which a rehearsal tests",
                hint=f"take the key out of the job file, or: --set {key}={wanted}",
            )


def _shorter_walltime(job: JobConfig) -> list[str]:
    time_limit = job.slurm.get("time")
    try:
        minutes = None if time_limit is None else parse_walltime_min(str(time_limit))
    except ValueError:
        # submit refuses it with a better message.
        return []
    return [] if minutes is not None and minutes <= _WALLTIME_MIN else [f"slurm.time={_WALLTIME_MIN}"]


class Watch:
    """Observes one rehearsal: metrics.jsonl often, the state of the job at the pace that Slurm allows."""

    def __init__(self, done: Submission, log: Log, *, longest_silence_s: float = _LONGEST_SILENCE_S) -> None:
        job = done.resolved.job
        self.run: RunDir = done.run
        self.cluster = done.resolved.cluster
        self.is_gated = job.preflight.enabled
        self.total_steps = int(job.training.max_steps or 0)
        self.first_job_id = self.job_id = str(done.job_id)
        self.log = log
        self.longest_silence_s = longest_silence_s
        self.records: list[Event] = []
        self.state = JobState(state="PENDING", source="submit")
        self._state_read_s = -math.inf
        self._final_since_s: float | None = None
        self._begun_s = self._news_s = time.monotonic()

    @property
    def slurm(self) -> Slurm:
        sent = load_submission(self.run)
        return slurm_of(sent) if sent else Slurm()

    def wait_until(self, holds: Callable[[], bool], *, on_look: Callable[[], None] = lambda: None) -> bool:
        """True once `holds`; False where the job ended before. Raises: RehearsalFailed after too long a time."""
        while True:
            self.look()
            if holds():
                return True
            if self._has_settled():
                return False
            on_look()
            self._require_time()
            time.sleep(_LOOK_S)

    def look(self) -> None:
        """Read records and state, and report what is new."""
        if time.monotonic() - self._state_read_s >= _ASK_S[self.cluster]:
            self._state_read_s = time.monotonic()
            before, self.state = self.state, load_job_states([self.run])[0]
            if (before.state, before.attempt) != (self.state.state, self.state.attempt):
                self._report_state()
            if not self.state.is_final:
                self._final_since_s = None
            elif self._final_since_s is None:
                self._final_since_s = time.monotonic()
        records = list(read_events(self.run))
        for record in records[len(self.records) :]:
            self._news_s = time.monotonic()
            if isinstance(record, TrainEvent):
                loss = math.nan if record.loss is None else record.loss
                self.log(f"attempt {record.attempt}: step {record.step}/{self.total_steps}, loss {loss:.4g}")
        self.records = records

    def reset_state(self) -> None:
        """Forget the job's state: it was sent once more."""
        sent = load_submission(self.run)
        self.job_id = str(sent.job_id) if sent else self.job_id
        self._state_read_s, self._final_since_s = -math.inf, None

    def trained(self, *, after: int) -> bool:
        """Whether a step was trained in an attempt after that one."""
        return any(isinstance(r, TrainEvent) and (r.attempt or 0) > after for r in self.records)

    def is_done(self) -> bool:
        """Whether the job has completed and its last step is visible."""
        return self.state.state == "COMPLETED" and any(r.step == self.total_steps for r in self.records)

    def stop(self) -> StopEvent | None:
        """The record of the stop, once there is one."""
        return next((r for r in self.records if isinstance(r, StopEvent)), None)

    def _report_state(self) -> None:
        self._news_s = time.monotonic()
        attempt = f", attempt {self.state.attempt}" if self.state.attempt else ""
        reason = f": {self.state.reason}" if self.state.reason else ""
        self.log(f"job {self.job_id}: {self.state.state}{attempt}{reason}")

    def _has_settled(self) -> bool:
        since = self._final_since_s
        return since is not None and time.monotonic() - since >= _SETTLE_S[self.cluster]

    def _require_time(self) -> None:
        is_waiting = self.state.state in ("PENDING", "CONFIGURING")
        waited = time.monotonic() - (self._begun_s if is_waiting else self._news_s)
        if waited > (_LONGEST_WAIT_S if is_waiting else self.longest_silence_s):
            raise RehearsalFailed(
                f"nothing new of job {self.job_id} ({self.state.state}) for {render_duration(waited)}: left alone",
                hint=f"{command_for('tail', self.run)}, or {command_for('cancel', self.run)}",
            )


def _stop_and_go_on(watch: Watch, environ: Mapping[str, str]) -> Rehearsal:
    """Wait until the job was stopped, has continued and ended; or ended before."""
    signalled_at = stop_seen_at = None
    checkpoint_step = None
    if watch.wait_until(lambda: any((r.step or 0) >= _SIGNAL_AFTER_STEP for r in watch.records)):
        signalled_at = time.time()
        watch.log(send_signal(watch))
        if watch.wait_until(lambda: watch.stop() is not None) and (stop := watch.stop()):
            stop_seen_at = time.time()
            checkpoint_step = _newest_checkpoint_step(watch, stop)
            watch.log(f"stopped after {stop_seen_at - signalled_at:.1f} s; newest whole checkpoint: {checkpoint_step}")
            _go_on(watch, environ, stop)
    return Rehearsal(
        records=watch.records,
        total_steps=watch.total_steps,
        is_gated=watch.is_gated,
        has_queue=watch.cluster != "local",
        state=watch.state,
        first_job_id=watch.first_job_id,
        job_id=watch.job_id,
        verdicts=load_verdicts(watch.run),
        ended_at=load_ends(watch.run),
        signalled_at=signalled_at,
        stop_seen_at=stop_seen_at,
        checkpoint_step=checkpoint_step,
    )


def _newest_checkpoint_step(watch: Watch, stop: StopEvent) -> int | None:
    """The step of the newest whole checkpoint; that of the stop may take a while to become visible on NFS."""
    deadline = time.monotonic() + _SETTLE_S[watch.cluster]
    while True:
        found = find_newest_checkpoint(watch.run)
        if (found is not None and found.step == stop.step) or time.monotonic() > deadline:
            return found.step if found else None
        time.sleep(_LOOK_S)


def send_signal(watch: Watch) -> str:
    """Send SIGUSR1 to the attempt, as Slurm does before the walltime ends. Returns: a line that describes it."""
    if watch.cluster == "local":
        pid = int(watch.job_id.removeprefix("local-"))
        # Checked right before: a pid can have passed to another process.
        if is_local_job(pid, watch.run):
            os.kill(pid, signal.SIGUSR1)
        return f"sent: kill -USR1 {pid}"
    watch.slurm.signal_batch(watch.job_id, "USR1")
    return f"sent: scancel --batch --signal=USR1 {watch.job_id}"


def _go_on(watch: Watch, environ: Mapping[str, str], stop: StopEvent) -> None:
    """Make the ended job continue: without a queue it is sent again, else Slurm has requeued it."""
    if watch.cluster == "local":
        watch.wait_until(lambda: watch.state.is_final)
        resume(watch.run, environ=environ)
        watch.reset_state()
        watch.log(f"sent again as {watch.job_id}: this machine has no queue")
        watch.wait_until(watch.is_done)
        return
    watch.wait_until(lambda: watch.trained(after=stop.attempt or 0), on_look=_EarlyStart(watch))
    watch.wait_until(watch.is_done)


class _EarlyStart:
    """Asks Slurm to start the requeued job at once, while it waits only for Slurm's own delay."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._left = _NUDGES
        self._last_s = -math.inf
        self._held_since_s: float | None = None

    def __call__(self) -> None:
        watch = self._watch
        is_held = watch.state.state == "PENDING" and watch.state.reason == "BeginTime"
        now_s = time.monotonic()
        if not is_held or not self._left:
            return
        self._held_since_s = now_s if self._held_since_s is None else self._held_since_s
        if now_s - self._held_since_s < _SETTLED_S or now_s - self._last_s < _ASK_S[watch.cluster]:
            return
        self._last_s, self._left = now_s, self._left - 1
        try:
            watch.slurm.start_now(watch.job_id)
        except JanusError as e:
            self._left = 0
            watch.log(f"Slurm holds a requeued job for about two minutes, and that could not be shortened: {e.message}")


def _report(seen: Rehearsal, claims: Sequence[Claim], done: Submission, log: Log) -> None:
    """Print what was proven, the times, and what was not proven."""
    log("")
    for claim in claims:
        log(f"{claim.state:<10}  {claim.name}: {claim.evidence}")
    for line in render_times(seen, stop_timeout_s=done.resolved.job.restart.stop_timeout_s):
        log(f"{'took':<10}  {line}")
    for line in list_unproven(seen, is_sandbox=done.resolved.cluster == "sandbox"):
        log(f"{'not proven':<10}  {line}")


def exit_code_of(claims: Sequence[Claim], run: RunDir) -> int:
    """0 where nothing failed; the job's own code where the gate or training did; else 14."""
    if not any(claim.state == "FAILED" for claim in claims):
        return 0
    state = load_job_states([run])[0]
    own = state.exit_code if state.state == "FAILED" else None
    return own if own in (10, 11, 12) else RehearsalFailed.exit_code
