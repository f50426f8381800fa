"""`janus-cluster tail`: one live log of all nodes, ranks and attempts of a run, until the job ends.

Lines come in the order of their times; what is noise becomes one live line at the bottom of a terminal.
"""

from __future__ import annotations

import re
import shlex
import time
from typing import TextIO

from janus_cluster.errors import JobNotFound, UsageError
from janus_cluster.observe.liveline import Screen, render_progress, render_start
from janus_cluster.observe.progress import Progress, load_progress
from janus_cluster.observe.tail_follow import Follower
from janus_cluster.observe.tail_view import View, parse_since
from janus_cluster.observe.text import clean_line
from janus_cluster.rundir import RunDir
from janus_cluster.slurm.recorded import StatusFile, load_status, load_submission
from janus_cluster.slurm.state import (
    FINAL_STATUS,
    MAY_BEGIN_AGAIN,
    NOBODY,
    WAITING,
    JobState,
    load_job_states,
)

CTRL_C_EXIT_CODE = 130
DEFAULT_NUM_LINES = 20
# An end that nobody vouches for may be NFS showing an old status.json, for up to 60 s by default (acregmax).
UNKNOWN_GRACE_S = 60.0
# A controller that is restarted or upgraded answers again within this; jobs run on meanwhile.
UNREACHABLE_GRACE_S = 600.0
_DRAIN_LOOKS = 20
# After so many looks that found nothing the next ones come less often.
_IDLE_LOOKS = 20
_IDLE_FACTOR = 4


def tail(
    run: RunDir,
    *,
    out: TextIO,
    num_lines: int | None = None,
    rank: int | None = None,
    node: str | None = None,
    grep: str | None = None,
    since: str | None = None,
    raw: bool = False,
    follow: bool = True,
    show_card: bool = True,
    poll_s: float = 0.5,
    state_poll_s: float = 15.0,
) -> int:
    """The run's logs are printed, and followed until the job has ended.

    num_lines: None is all lines `since`, and DEFAULT_NUM_LINES where that is not given either.
    Returns:   the job's own exit code, never 0 for an end that nobody knows; 130 after Ctrl-C. Without `follow`: 0 for
               a job that still runs.
    Raises:    UsageError for a bad expression or time, JobNotFound for a run that was never submitted or whose folder
               has been removed.
    """
    try:
        pattern = re.compile(grep) if grep is not None else None
    except re.error as e:
        raise UsageError(f"--grep {grep!r} is no regular expression: {e}") from e
    view = View(
        num_lines=DEFAULT_NUM_LINES if num_lines is None and since is None else num_lines,
        rank=rank,
        node=node,
        grep=pattern,
        since=None if since is None else parse_since(since, now=time.time()),
        raw=raw,
    )
    screen = Screen(out)
    follower = Follower(run, view, screen)
    follower.folds_steps = follow and screen.can_live and not raw and pattern is None
    try:
        watch = _Watch(run, follower, screen, show_card=show_card, poll_s=poll_s, state_poll_s=state_poll_s)
        return watch.run_to_end(follow=follow)
    except KeyboardInterrupt:
        follower.print_held()
        screen.leave()
        screen.write(["", f"stopped watching; the job goes on. janus-cluster cancel {shlex.quote(run.name)} ends it"])
        screen.flush()
        return CTRL_C_EXIT_CODE


class _Watch:
    """Decides when the job is over: its own status.json at every look, the state ladder now and then."""

    def __init__(
        self,
        run: RunDir,
        follower: Follower,
        screen: Screen,
        *,
        show_card: bool,
        poll_s: float,
        state_poll_s: float,
    ) -> None:
        self.run = run
        self.follower = follower
        self.screen = screen
        self.show_card = show_card
        self.poll_s = poll_s
        self.state_poll_s = state_poll_s
        self._told: tuple[str, str | None, bool] | None = None
        self._unknown_since: float | None = None
        self._waits_since = time.monotonic()
        self._progress = Progress()
        self._metrics_size = -1

    def run_to_end(self, *, follow: bool) -> int:
        if load_submission(self.run) is None:
            from janus_cluster.observe.status import submit_by_hand

            raise JobNotFound(f"{self.run.name} was not submitted yet", hint=submit_by_hand(self.run))
        # Slurm may need half a minute for an answer: what is there is shown before it is asked.
        self.follower.print_last()
        self._ask()
        # The last word of an attempt that was requeued since is not the end of the job.
        self._old_word = None if self.state.is_final else load_status(self.run)
        self._told_end = None if self._old_word is None else (self._old_word.attempt, self._old_word.state)
        self._tell()
        if not follow:
            self._catch_up()
            self.follower.print_new(at_end=True)
            running = not self.state.is_final and self.state.state != "UNKNOWN"
            return 0 if running else self._end()
        self._follow()
        for _ in range(_DRAIN_LOOKS):
            if not self._catch_up():
                break
            time.sleep(self.poll_s)
        self.follower.print_new(at_end=True)
        self._show_live()
        self.screen.leave()
        return self._end()

    def _follow(self) -> None:
        idle_looks = 0
        while not self._is_over():
            idle_looks = 0 if self.follower.print_new() else idle_looks + 1
            self._show_live()
            if not self.follower.has_more:
                time.sleep(self.poll_s * (_IDLE_FACTOR if idle_looks > _IDLE_LOOKS else 1))

    def _catch_up(self) -> bool:
        """All that is there is printed. Returns: whether anything came."""
        came = self.follower.print_new()
        while self.follower.has_more:
            self.follower.print_new()
        return came

    def _ask(self) -> None:
        self._asked_at = time.monotonic()
        if not self.run.path.is_dir():
            self.screen.leave()
            raise JobNotFound(f"{self.run.path} is gone", hint="squeue --me tells whether its job still runs")
        self.state = load_job_states([self.run], max_age_s=self.state_poll_s)[0]

    def _is_over(self) -> bool:
        word = load_status(self.run)
        if word is not None and word.state in FINAL_STATUS and word != self._old_word:
            if self._is_last(word):
                self.state = self._from_own_word(word)
            elif (word.attempt, word.state) != self._told_end:
                self._told_end = (word.attempt, word.state)
                self.follower.mark(f"attempt {word.attempt} {word.state}: {word.reason or 'no reason given'}")
        elif word is not None and word.state == "RUNNING" and self._has_begun(word):
            self.state = self._from_own_word(word)
        if not self.state.is_final and time.monotonic() - self._asked_at >= self.state_poll_s:
            self._ask()
        self._tell()
        if self.state.state != "UNKNOWN":
            self._unknown_since = None
            return self.state.is_final
        self._unknown_since = self._unknown_since or time.monotonic()
        grace_s = UNREACHABLE_GRACE_S if self.state.source == NOBODY else UNKNOWN_GRACE_S
        return time.monotonic() - self._unknown_since >= grace_s

    def _has_begun(self, word: StatusFile) -> bool:
        """Whether the job has left the queue since Slurm was asked."""
        return self.state.state in WAITING and word.attempt != self.state.attempt

    def _is_last(self, word: StatusFile) -> bool:
        return word.state not in MAY_BEGIN_AGAIN or word.cluster == "local"

    def _from_own_word(self, word: StatusFile) -> JobState:
        return JobState(
            state=word.state,
            source="status.json",
            age_s=0.0,
            exit_code=word.exit_code if word.exit_code is not None or not word.signal else 128 + word.signal,
            reason=word.reason,
            nodes=word.nodes,
            attempt=word.attempt,
        )

    def _tell(self) -> None:
        state = self.state
        # An expected start moves with every look of Slurm's at its queue; the live line follows it.
        now_told = (state.state, state.reason, state.starts_at is None)
        if state.is_final or now_told == self._told:
            return
        if self._told is None or self._told[0] != state.state:
            self._waits_since = time.monotonic()
        self._told = now_told
        on = f" on {', '.join(state.nodes)}" if state.nodes else ""
        again = f", queued again after attempt {state.attempt}" if state.state in WAITING and state.attempt else ""
        why = f": {state.reason}" if state.reason else ""
        start = render_start(state.starts_at, now=time.time())
        self.follower.mark(f"{state.state}{on}{again}{why}{f'; {start}' if start else ''}")

    def _show_live(self) -> None:
        """The live line says where the job stands now."""
        if not self.follower.folds_steps:
            return
        now = time.time()
        state = self.state
        if state.state in WAITING:
            from janus_cluster.observe.status import render_duration

            waited = f"for {render_duration(time.monotonic() - self._waits_since)}"
            parts = [f"{state.state} {waited}", state.reason or "", render_start(state.starts_at, now=now)]
        else:
            parts = [self._render_attempt(now), self.follower.bar]
        self.screen.show(clean_line(" · ".join(part for part in parts if part)))
        self.screen.flush()

    def _load_progress(self) -> Progress:
        try:
            size = self.run.metrics_jsonl.stat().st_size
        except OSError:
            return Progress()
        if size != self._metrics_size:
            self._metrics_size, self._progress = size, load_progress(self.run)
        return self._progress

    def _render_attempt(self, now: float) -> str:
        """How far the attempt has come that runs now; the steps of one before it are said to be that."""
        word, progress = load_status(self.run), self._load_progress()
        if word is None or word.attempt is None or word.phase in (None, "done"):
            return render_progress(progress, now=now) or self.follower.last_step or self.state.state
        if progress.attempt is not None and progress.attempt >= word.attempt:
            return render_progress(progress, now=now)
        before = f" · step {progress.step}/{progress.total_steps} before" if progress.step is not None else ""
        return self.follower.last_step or f"attempt {word.attempt}: {word.phase}, no step yet{before}"

    def _end(self) -> int:
        code = self.state.command_exit_code
        if self.follower.num_left_out:
            self.follower.mark(
                f"{self.follower.num_left_out} lines of DeepSpeed's and NCCL's INFO were left out; --raw shows them"
            )
        if self.state.is_final:
            self._tell_failure()
        why = f": {self.state.reason}" if self.state.reason else ""
        source = "nobody" if self.state.source == NOBODY else self.state.source
        self.follower.mark(f"{self.state.state} (exit code {code}, says {source}){why}")
        return code

    def _tell_failure(self) -> None:
        """The card of a failed run is printed, and the nodes that it blames are remembered."""
        from janus_cluster.observe.harvest import remember_bad_nodes
        from janus_cluster.observe.status import add_card, load_run_status, next_commands, render_failure

        status = add_card(load_run_status(self.run, self.state))
        if status.card is None:
            return
        remember_bad_nodes(status)
        if self.show_card:
            self.follower.mark("what failed")
            self.screen.write([*render_failure(status), *(f"  next: {c}" for c in next_commands(status))])
            self.screen.flush()
