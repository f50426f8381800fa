"""`janus-cluster tail`: one live log of all nodes, ranks and attempts of a run, until the job ends.

Lines come in the order of their times; what is noise becomes one live line at the bottom of a terminal.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from janus_cluster.errors import JobCannotStart, JobNotFound, UsageError
from janus_cluster.observe.liveline import Screen, render_progress, render_start
from janus_cluster.observe.progress import Progress, load_progress
from janus_cluster.observe.tail_follow import Follower
from janus_cluster.observe.tail_view import View, parse_since
from janus_cluster.run.hosts import fold_nodes
from janus_cluster.run.next_command import command_for
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.submission import StatusRecord, load_status, load_submission
from janus_cluster.run.text import clean_line
from janus_cluster.slurm.pending import Pending, read_reason
from janus_cluster.slurm.state import (
    FINAL_STATUS,
    MAY_BEGIN_AGAIN,
    NO_SOURCE,
    WAITING,
    JobState,
    load_job_states,
)

if TYPE_CHECKING:
    from janus_cluster.observe.status import RunStatus

CTRL_C_EXIT_CODE = 130
DEFAULT_NUM_LINES = 20
# An unconfirmed end may be a stale status.json on NFS, for up to 60 s by default (acregmax).
UNKNOWN_GRACE_S = 60.0
# A controller that is restarted or upgraded answers again within this; jobs run on meanwhile.
UNREACHABLE_GRACE_S = 600.0
# A requeue without nodes holds the job for seconds; a partition that is down, or a hold, may be ended by someone soon.
CANNOT_START_GRACE_S = 600.0
# Only the user ends it; but a job that requeues itself without a node is held for seconds.
FOR_USER_ALONE_GRACE_S = 60.0
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
    on_failure: Callable[[RunStatus], object] | None = None,
    poll_s: float = 0.5,
    state_poll_s: float = 15.0,
) -> int:
    """Print the run's logs, and follow them until the job has ended.

    on_failure: called with the state and card of a run that failed.
    num_lines:  None is all lines `since`, and DEFAULT_NUM_LINES where that is not given either.
    Returns:   the job's own exit code, never 0 for an unknown end; 130 after Ctrl-C. Without `follow`: 0 for
               a job that still runs or waits.
    Raises:    JobCannotStart for a job that its user holds, or otherwise alone can let start, for a minute, and for
               another one that cannot start for 10 minutes; UsageError for a bad
               expression or time; JobNotFound for a run that was never submitted or whose folder has been removed.
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
        watch = _Watch(
            run,
            follower,
            screen,
            show_card=show_card,
            on_failure=on_failure,
            poll_s=poll_s,
            state_poll_s=state_poll_s,
        )
        return watch.run_to_end(follow=follow)
    except KeyboardInterrupt:
        follower.print_held()
        screen.leave()
        screen.write(["", f"stopped watching; the job goes on. {command_for('cancel', run)} ends it"])
        screen.flush()
        return CTRL_C_EXIT_CODE


class _Watch:
    """Decides when the job is over: its status.json at every look, Slurm periodically."""

    def __init__(
        self,
        run: RunDir,
        follower: Follower,
        screen: Screen,
        *,
        show_card: bool,
        on_failure: Callable[[RunStatus], object] | None,
        poll_s: float,
        state_poll_s: float,
    ) -> None:
        self.run = run
        self.follower = follower
        self.screen = screen
        self.show_card = show_card
        self.on_failure = on_failure
        self.poll_s = poll_s
        self.state_poll_s = state_poll_s
        self._shown: tuple[str, str | None, bool] | None = None
        # Since when the state is one that following ends with after a grace.
        self._doubtful_since: float | None = None
        self._waits_since = time.monotonic()
        self._progress = Progress()
        self._metrics_size = -1

    def run_to_end(self, *, follow: bool) -> int:
        if load_submission(self.run) is None:
            from janus_cluster.observe.status import submit_by_hand

            raise JobNotFound(f"{self.run.name} was not submitted yet", hint=submit_by_hand(self.run))
        # Slurm may need half a minute for an answer: what is there is shown first.
        self.follower.print_last()
        self._load_state()
        # The end of an attempt that was requeued since is not the end of the job.
        self._old_status = None if self.state.is_final else load_status(self.run)
        self._shown_end = None if self._old_status is None else (self._old_status.attempt, self._old_status.state)
        self._show_state()
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
        """Print everything that is there. Returns: whether there was anything new."""
        has_new = self.follower.print_new()
        while self.follower.has_more:
            self.follower.print_new()
        return has_new

    def _load_state(self) -> None:
        self._loaded_at = time.monotonic()
        if not self.run.path.is_dir():
            self.screen.leave()
            raise JobNotFound(f"{self.run.path} is gone", hint="squeue --me shows whether its job still runs")
        self.state = load_job_states([self.run])[0]

    def _is_over(self) -> bool:
        status = load_status(self.run)
        if status is not None and status.state in FINAL_STATUS and status != self._old_status:
            if self._is_last(status):
                self.state = self._state_from(status)
            elif (status.attempt, status.state) != self._shown_end:
                self._shown_end = (status.attempt, status.state)
                self.follower.mark(f"attempt {status.attempt} {status.state}: {status.reason or 'no reason given'}")
        elif status is not None and status.state == "RUNNING" and self._has_begun(status):
            self.state = self._state_from(status)
        if not self.state.is_final and time.monotonic() - self._loaded_at >= self.state_poll_s:
            self._load_state()
        self._show_state()
        grace_s = self._grace_s()
        if grace_s is None:
            self._doubtful_since = None
            return self.state.is_final
        self._doubtful_since = self._doubtful_since or time.monotonic()
        return time.monotonic() - self._doubtful_since >= grace_s

    def _grace_s(self) -> float | None:
        """How long to follow a job whose end is not known, or that cannot start; None for any other."""
        if self.state.state == "UNKNOWN":
            return UNREACHABLE_GRACE_S if self.state.source == NO_SOURCE else UNKNOWN_GRACE_S
        pending = self._pending()
        if pending.outlook != "never":
            return None
        return FOR_USER_ALONE_GRACE_S if pending.is_for_user_alone else CANNOT_START_GRACE_S

    def _pending(self) -> Pending:
        if self.state.state not in WAITING:
            return Pending("waits")
        return read_reason(self.state.reason, job_id=self._job_id())

    def _has_begun(self, status: StatusRecord) -> bool:
        """Whether the job has left the queue since Slurm was queried."""
        return self.state.state in WAITING and status.attempt != self.state.attempt

    def _is_last(self, status: StatusRecord) -> bool:
        return status.state not in MAY_BEGIN_AGAIN or status.cluster == "local"

    def _state_from(self, status: StatusRecord) -> JobState:
        return JobState(
            state=status.state,
            source="status.json",
            age_s=0.0,
            exit_code=status.exit_code if status.exit_code is not None or not status.signal else 128 + status.signal,
            reason=status.reason,
            nodes=status.nodes,
            attempt=status.attempt,
        )

    def _show_state(self) -> None:
        state = self.state
        # An expected start moves with every look of Slurm's at its queue; the live line follows it.
        current = (state.state, state.reason, state.starts_at is None)
        if state.is_final or current == self._shown:
            return
        if self._shown is None or self._shown[0] != state.state:
            self._waits_since = time.monotonic()
        self._shown = current
        on = f" on {fold_nodes(state.nodes)}" if state.nodes else ""
        again = f", queued again after attempt {state.attempt}" if state.state in WAITING and state.attempt else ""
        why = f": {state.reason}" if state.reason else ""
        pending = self._pending()
        # A start that Slurm still expects will not come where the job cannot start.
        start = "" if pending.outlook == "never" else render_start(state.starts_at, now=time.time())
        self.follower.mark(f"{state.state}{on}{again}{why}{f'; {start}' if start else ''}")
        if pending.command:
            self.follower.mark(f"{pending.meaning}; next: {pending.command}")

    def _job_id(self) -> str:
        sent = load_submission(self.run)
        return (sent.job_id if sent else None) or ""

    def _show_live(self) -> None:
        """Update the live line to the job's present state."""
        if not self.follower.folds_steps:
            return
        now = time.time()
        state = self.state
        if state.state in WAITING:
            from janus_cluster.run.times import render_duration

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
        """Progress of the attempt that runs now; steps of an earlier one are marked as such."""
        status, progress = load_status(self.run), self._load_progress()
        if status is None or status.attempt is None or status.phase in (None, "done"):
            return render_progress(progress, now=now) or self.follower.last_step or self.state.state
        if progress.attempt is not None and progress.attempt >= status.attempt:
            return render_progress(progress, now=now)
        before = f" · step {progress.step}/{progress.total_steps} before" if progress.step is not None else ""
        return self.follower.last_step or f"attempt {status.attempt}: {status.phase}, no step yet{before}"

    def _end(self) -> int:
        pending = self._pending()
        if pending.outlook == "never":
            raise JobCannotStart(
                f"job {self._job_id()} is queued and cannot start: {self.state.reason}, {pending.meaning}; it is no "
                "longer followed",
                hint=pending.command,
            )
        code = self.state.command_exit_code
        if self.follower.num_left_out:
            self.follower.mark(
                f"{self.follower.num_left_out} lines of DeepSpeed's and NCCL's INFO were left out; --raw shows them"
            )
        if self.state.is_final:
            self._show_failure()
        why = f": {self.state.reason}" if self.state.reason else ""
        self.follower.mark(f"{self.state.state} (exit code {code}, source: {self.state.source}){why}")
        if self.state.state == "COMPLETED" and self.show_card and self.follower.view.shows_all:
            self._show_result()
        return code

    def _show_result(self) -> None:
        """Print what a completed run left, and what to do with it."""
        from janus_cluster.observe.status import load_run_status
        from janus_cluster.observe.status_view import render_notes

        _, *lines = render_notes(load_run_status(self.run, self.state))
        self.screen.write(lines)
        self.screen.flush()

    def _show_failure(self) -> None:
        """Print the card of a failed run, after `on_failure` was called with it."""
        from janus_cluster.observe.status import add_card, load_run_status, next_commands
        from janus_cluster.observe.status_view import render_failure

        status = add_card(load_run_status(self.run, self.state))
        if status.card is None:
            return
        if self.on_failure is not None:
            self.on_failure(status)
        if self.show_card:
            self.follower.mark("what failed")
            self.screen.write([*render_failure(status), *(f"  next: {c}" for c in next_commands(status))])
            self.screen.flush()
