"""`janus-cluster submit --rehearse`: a few real steps of the job, stopped on purpose, which must go on exactly there.

The job itself is short, everything else is what the real run will meet: the same script, gate, data, model, queue.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from janus_cluster.config.schema import JobConfig
from janus_cluster.errors import JanusError, RehearsalFailed, UsageError
from janus_cluster.local.process import is_local_job
from janus_cluster.observe.checkpoints import find_newest_checkpoint
from janus_cluster.observe.rehearsal import (
    Claim,
    Rehearsal,
    judge_rehearsal,
    list_unproven,
    load_ends,
    load_verdicts,
    render_times,
)
from janus_cluster.render.sbatch_options import parse_walltime_min
from janus_cluster.resume import resume
from janus_cluster.rundir import RunDir
from janus_cluster.slurm.commands import Slurm
from janus_cluster.slurm.recorded import load_submission
from janus_cluster.slurm.state import JobState, load_job_states
from janus_cluster.submit import Request, Submission, load_request, submit

SUFFIX = "-rehearsal"
_MAX_STEPS = 6
# A tiny model takes a tenth of a second for a step: six would be over before the signal is there.
_MAX_STEPS_OF_TINY = 40
# The signal is sent when this step stands in metrics.jsonl: the first one also pays for what is loaded once.
_SIGNAL_AFTER_STEP = 2
# A step to be signalled in, one to stop after, one to go on with.
_FEWEST_STEPS = _SIGNAL_AFTER_STEP + 2
# Six steps of the slowest known runs (78 s), twice the gate and the loading of weights; a short job is backfilled.
_WALLTIME_MIN = 60
_LONGEST_NAME = 64

_LOOK_S = 0.3
# Every look at Slurm is an RPC to a controller that others use.
_ASK_S = {"slurm": 10.0, "sandbox": 1.0, "local": 0.5}
# NFS may show an old metrics.jsonl for some seconds after the job's end.
_SETTLE_S = {"slurm": 30.0, "sandbox": 3.0, "local": 1.0}
_LONGEST_WAIT_S = 24 * 3600.0
_LONGEST_SILENCE_S = 3600.0
_NUDGES = 20
# Begun again in the second of its requeue, slurmd takes the job for the one that it has just killed, and it fails.
_SETTLED_S = 5.0

Say = Callable[[str], None]


def rehearse(request: Request, *, environ: Mapping[str, str], cwd: Path, say: Say) -> tuple[Submission, list[Claim]]:
    """The rehearsal has run; each claim says what was seen. `say` is given a line for everything that happens.

    Raises: UsageError for a job that cannot be rehearsed, RehearsalFailed where it takes too long; as submit does.
    """
    short = shorten(request, environ)
    done = submit(short, environ=environ, cwd=cwd)
    watch = Watch(done, say)
    say(f"rehearsal: job {done.job_id}, {watch.total_steps} steps, in {done.run.path}")
    if done.resolved.memory is not None:
        from janus_cluster.plan.auto import describe_memory

        say(f"memory: {describe_memory(done.resolved.memory)[0]}")
    try:
        seen = _stop_and_go_on(watch, environ)
    except KeyboardInterrupt:
        ref = watch.job_id
        say(f"\nnobody watches the rehearsal any more; job {ref} is left alone: it was not proven that it goes on")
        say(f"next: janus-cluster status {ref}, or janus-cluster cancel {ref}")
        raise
    claims = judge_rehearsal(seen)
    _tell(seen, claims, done, say)
    return done, claims


def shorten(request: Request, environ: Mapping[str, str]) -> Request:
    """The request for a few steps of the same job, under a name of its own.

    The user's --set win over the length. Raises: UsageError for a job that cannot be rehearsed.
    """
    given = load_request(request, environ).config
    _refuse(given)
    length = _MAX_STEPS_OF_TINY if given.model.preset == "tiny" else _MAX_STEPS
    lengths = [f"training.max_steps={length}", *_shorter_walltime(given)]
    sets = [*lengths, *request.sets]
    steps = load_request(replace(request, sets=sets), environ).config.training.max_steps or length
    if steps < _FEWEST_STEPS:
        raise UsageError(
            f"training.max_steps: {steps}: a rehearsal is stopped after step {_SIGNAL_AFTER_STEP} and must go on; "
            f"allowed: {_FEWEST_STEPS} or more"
        )
    sets += [
        "training.logging_steps=1",
        "training.evaluate_every_steps=null",
        "data.validation_fraction=0",
        # Saved on its own account at the end only: what lies there in between was written because of the stop.
        f"checkpoint.every_steps={steps}",
        "checkpoint.keep_last=2",
        "checkpoint.export=false",
    ]
    name = given.name[: _LONGEST_NAME - len(SUFFIX)] + SUFFIX
    return replace(request, sets=sets, name=name, dry_run=False)


def _refuse(job: JobConfig) -> None:
    """Raises: UsageError for a job that would not go on after a stop."""
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
                f"{key}: {value}: this job would not go on after a stop, and that is what a rehearsal tries",
                hint=f"take the key out of the job file, or: --set {key}={wanted}",
            )


def _shorter_walltime(job: JobConfig) -> list[str]:
    time_limit = job.slurm.get("time")
    try:
        minutes = None if time_limit is None else parse_walltime_min(str(time_limit))
    except ValueError:
        # submit refuses it in better words.
        return []
    return [] if minutes is not None and minutes <= _WALLTIME_MIN else [f"slurm.time={_WALLTIME_MIN}"]


class Watch:
    """One rehearsal as it can be seen from the desk: metrics.jsonl often, the state of the job at a sane pace."""

    def __init__(self, done: Submission, say: Say, *, longest_silence_s: float = _LONGEST_SILENCE_S) -> None:
        job = done.resolved.job
        self.run: RunDir = done.run
        self.cluster = done.resolved.cluster
        self.slurm_conf = done.slurm_conf
        self.is_gated = job.preflight.enabled
        self.total_steps = int(job.training.max_steps or 0)
        self.first_job_id = self.job_id = str(done.job_id)
        self.say = say
        self.longest_silence_s = longest_silence_s
        self.records: list[dict[str, Any]] = []
        self.state = JobState(state="PENDING", source="submit")
        self._asked_s = -math.inf
        self._final_since_s: float | None = None
        self._begun_s = self._news_s = time.monotonic()

    def wait_until(self, holds: Callable[[], bool], *, on_look: Callable[[], None] = lambda: None) -> bool:
        """True once `holds`; False where the job has ended without. Raises: RehearsalFailed after too long a time."""
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
        """Records and state are those of this moment, and what is new about them was said."""
        if time.monotonic() - self._asked_s >= _ASK_S[self.cluster]:
            self._asked_s = time.monotonic()
            before, self.state = self.state, load_job_states([self.run])[0]
            if (before.state, before.attempt) != (self.state.state, self.state.attempt):
                self._tell_state()
            if not self.state.is_final:
                self._final_since_s = None
            elif self._final_since_s is None:
                self._final_since_s = time.monotonic()
        records = list(self.run.read_metrics())
        for record in records[len(self.records) :]:
            self._news_s = time.monotonic()
            if record.get("kind") == "train":
                self.say(
                    f"attempt {record['attempt']}: step {record['step']}/{self.total_steps}, loss {record['loss']:.4g}"
                )
        self.records = records

    def began_again(self) -> None:
        """The job that is watched was sent once more: what is known of its state is out of date."""
        sent = load_submission(self.run)
        self.job_id = str(sent.job_id) if sent else self.job_id
        self._asked_s, self._final_since_s = -math.inf, None

    def trained(self, *, after: int) -> bool:
        """Whether a step was trained in an attempt after that one."""
        return any(r.get("kind") == "train" and r["attempt"] > after for r in self.records)

    def is_done(self) -> bool:
        """Whether the job has completed and its last step is to be seen."""
        return self.state.state == "COMPLETED" and any(r.get("step") == self.total_steps for r in self.records)

    def stop(self) -> dict[str, Any] | None:
        """The record of the stop, once there is one."""
        return next((r for r in self.records if r.get("kind") == "stop"), None)

    def _tell_state(self) -> None:
        self._news_s = time.monotonic()
        attempt = f", attempt {self.state.attempt}" if self.state.attempt else ""
        reason = f": {self.state.reason}" if self.state.reason else ""
        self.say(f"job {self.job_id}: {self.state.state}{attempt}{reason}")

    def _has_settled(self) -> bool:
        since = self._final_since_s
        return since is not None and time.monotonic() - since >= _SETTLE_S[self.cluster]

    def _require_time(self) -> None:
        is_waiting = self.state.state in ("PENDING", "CONFIGURING")
        waited = time.monotonic() - (self._begun_s if is_waiting else self._news_s)
        if waited > (_LONGEST_WAIT_S if is_waiting else self.longest_silence_s):
            raise RehearsalFailed(
                f"nothing new of job {self.job_id} ({self.state.state}) for {waited / 60:.0f} min; it is left alone",
                hint=f"janus-cluster tail {self.job_id}, or janus-cluster cancel {self.job_id}",
            )


def _stop_and_go_on(watch: Watch, environ: Mapping[str, str]) -> Rehearsal:
    """The job was stopped, went on and has ended; or ended before."""
    signalled_at = stop_seen_at = None
    checkpoint_step = None
    if watch.wait_until(lambda: any(r.get("step", 0) >= _SIGNAL_AFTER_STEP for r in watch.records)):
        signalled_at = time.time()
        watch.say(send_signal(watch))
        if watch.wait_until(lambda: watch.stop() is not None):
            stop_seen_at = time.time()
            checkpoint_step = _newest_checkpoint_step(watch)
            watch.say(f"stopped after {stop_seen_at - signalled_at:.1f} s; newest whole checkpoint: {checkpoint_step}")
            _go_on(watch, environ)
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


def _newest_checkpoint_step(watch: Watch) -> int | None:
    """The step of the newest whole checkpoint; that of the stop is given a while to be seen through NFS."""
    wanted = int((watch.stop() or {})["step"])
    deadline = time.monotonic() + _SETTLE_S[watch.cluster]
    while True:
        found = find_newest_checkpoint(watch.run)
        if (found is not None and found.step == wanted) or time.monotonic() > deadline:
            return found.step if found else None
        time.sleep(_LOOK_S)


def send_signal(watch: Watch) -> str:
    """The attempt was sent SIGUSR1, as Slurm sends it before the walltime ends. Returns: the words for it."""
    if watch.cluster == "local":
        pid = int(watch.job_id.removeprefix("local-"))
        # Asked right before: a pid can have passed to another process.
        if is_local_job(pid, watch.run):
            os.kill(pid, signal.SIGUSR1)
        return f"sent: kill -USR1 {pid}"
    Slurm(conf=watch.slurm_conf).signal_batch(watch.job_id, "USR1")
    return f"sent: scancel --batch --signal=USR1 {watch.job_id}"


def _go_on(watch: Watch, environ: Mapping[str, str]) -> None:
    """The job has ended for good: where there is no queue it was sent again, else Slurm began it again."""
    stopped = int((watch.stop() or {})["attempt"])
    if watch.cluster == "local":
        watch.wait_until(lambda: watch.state.is_final)
        resume(watch.run, environ=environ)
        watch.began_again()
        watch.say(f"sent again as {watch.job_id}: this machine has no queue")
        watch.wait_until(watch.is_done)
        return
    watch.wait_until(lambda: watch.trained(after=stopped), on_look=_Nudge(watch))
    watch.wait_until(watch.is_done)


class _Nudge:
    """Asks Slurm to begin the requeued job at once, while it waits for nothing but Slurm's own delay."""

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
            Slurm(conf=watch.slurm_conf).start_now(watch.job_id)
        except JanusError as e:
            self._left = 0
            watch.say(f"Slurm holds a requeued job back for about two minutes, and it stays so: {e.message}")


def _tell(seen: Rehearsal, claims: Sequence[Claim], done: Submission, say: Say) -> None:
    """What was proven, what it took, and what was not proven, line by line."""
    say("")
    for claim in claims:
        say(f"{claim.state:<10}  {claim.name}: {claim.evidence}")
    for line in render_times(seen, stop_timeout_s=done.resolved.job.restart.stop_timeout_s):
        say(f"{'took':<10}  {line}")
    for line in list_unproven(seen, is_sandbox=done.resolved.cluster == "sandbox"):
        say(f"{'not proven':<10}  {line}")


def exit_code_of(claims: Sequence[Claim], run: RunDir) -> int:
    """0 where nothing failed; the job's own code where the gate or training did; else 14."""
    if not any(claim.state == "FAILED" for claim in claims):
        return 0
    state = load_job_states([run])[0]
    own = state.exit_code if state.state == "FAILED" else None
    return own if own in (10, 11, 12) else RehearsalFailed.exit_code


def run_rehearsal(request: Request, *, as_json: bool) -> int:
    """The rehearsal has run and what it proved is printed. Returns: the exit code of the command."""
    import click

    def say(line: str) -> None:
        click.echo(line, err=as_json)

    done, claims = rehearse(request, environ=os.environ, cwd=Path.cwd(), say=say)
    code = exit_code_of(claims, done.run)
    failed = [claim.name for claim in claims if claim.state == "FAILED"]
    if as_json:
        import json

        listed = [{"name": c.name, "state": c.state, "evidence": c.evidence} for c in claims]
        value = {"run_dir": str(done.run.path), "job_id": done.job_id, "exit_code": code, "claims": listed}
        click.echo(json.dumps(value, indent=2, ensure_ascii=False))
        return code
    say("")
    if not failed:
        say(f"rehearsed: the job can be stopped and goes on. The real run: janus-cluster submit {request.job or '…'}")
        return code
    from janus_cluster.observe.cli import print_status

    sys.stdout.flush()
    # The card of a failed run has what to type next.
    print_status([done.run])
    say(f"rehearsal failed: {'; '.join(failed)}")
    return code
