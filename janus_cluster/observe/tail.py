"""`janus-cluster tail`: one live log of all nodes, ranks and attempts of a run, until the job ends.

Lines carry no times, so they come file by file in the order in which they are found.
"""

from __future__ import annotations

import os
import re
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from janus_cluster.errors import JobNotFound, UsageError
from janus_cluster.observe.logfile import GrowingFile
from janus_cluster.observe.text import clean_line, load_secrets, redact
from janus_cluster.rundir import RunDir
from janus_cluster.slurm.recorded import StatusFile, load_status, load_submission
from janus_cluster.slurm.state import (
    FINAL_STATUS,
    MAY_BEGIN_AGAIN,
    NOBODY,
    JobState,
    load_job_states,
)

CTRL_C_EXIT_CODE = 130
# What a shell reports for a program that SIGPIPE ended: `tail | head` is no success of the job.
BROKEN_PIPE_EXIT_CODE = 141
# An end that nobody vouches for may be NFS showing an old status.json, for up to 60 s by default (acregmax).
UNKNOWN_GRACE_S = 60.0
# A controller that is restarted or upgraded answers again within this; jobs run on meanwhile.
UNREACHABLE_GRACE_S = 600.0
_DRAIN_LOOKS = 20
_COLOURS = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)


@dataclass(frozen=True, kw_only=True)
class View:
    """Which lines are shown."""

    num_lines: int = 20
    rank: int | None = None
    node: str | None = None
    grep: re.Pattern[str] | None = None

    def shows_file(self, source: LogSource) -> bool:
        """Whether the file's lines are wanted at all."""
        if self.rank is not None and source.rank != self.rank:
            return False
        return self.node is None or source.node == self.node

    def shows_line(self, line: str) -> bool:
        """Whether the line is wanted."""
        return self.grep is None or self.grep.search(line) is not None


@dataclass(frozen=True, kw_only=True)
class LogSource:
    """Where a log file's lines come from; attempt 0 is the batch script's own log."""

    attempt: int
    node: str | None
    rank: int | None

    @property
    def label(self) -> str:
        if self.node is None:
            return "batch"
        return self.node if self.rank is None else f"{self.node}:{self.rank}"


def parse_log_source(run: RunDir, path: Path) -> LogSource | None:
    """What the file's place and name say; None for a file that is no log of ours."""
    if path == run.batch_log:
        return LogSource(attempt=0, node=None, rank=None)
    attempt = re.fullmatch(r"attempt_(\d+)", path.parent.name)
    name = re.fullmatch(r"(?P<node>.+?)(?:\.rank(?P<rank>\d+))?\.log", path.name)
    if attempt is None or name is None:
        return None
    rank = int(name["rank"]) if name["rank"] else None
    return LogSource(attempt=int(attempt.group(1)), node=name["node"], rank=rank)


class Follower:
    """All logs of one run, read as they grow and printed with the name of where they come from."""

    def __init__(self, run: RunDir, view: View, out: TextIO) -> None:
        self.run = run
        self.view = view
        self.out = out
        self._colour = out.isatty() and not os.environ.get("NO_COLOR")
        self._files: dict[Path, tuple[LogSource, GrowingFile]] = {}
        self._shown_attempt: int | None = None
        self._secrets = load_secrets(run)

    def print_last(self) -> None:
        """The last lines of what is there now are printed, every file having its share."""
        self._find_files()
        files = list(self._files.values())
        found = [file.start_at_end(self.view.num_lines, self.view.shows_line) for _, file in files]
        newest = max((source.attempt for source, _ in files), default=0)
        groups = ([s.attempt in (0, newest) for s, _ in files], [s.attempt not in (0, newest) for s, _ in files])
        budget = self.view.num_lines
        shares = [0] * len(files)
        for group in groups:
            asked = [len(lines) if chosen else 0 for lines, chosen in zip(found, group, strict=True)]
            for i, share in enumerate(share_out(asked, budget)):
                shares[i] += share
            budget = self.view.num_lines - sum(shares)
        for (source, _), lines, share in zip(files, found, shares, strict=True):
            self._print(source, lines[len(lines) - share :])

    def print_new(self, *, at_end: bool = False) -> bool:
        """What came since the last look is printed. Returns: whether anything came."""
        self._find_files()
        came = False
        for source, file in self._files.values():
            before = file.offset
            lines, was_cut = file.read_new()
            came = came or was_cut or file.offset != before
            if was_cut:
                self.mark(f"{source.label}: the log was cut short or replaced; from its beginning:")
            lines += file.read_partial(at_end=at_end)
            self._print(source, [line for line in lines if self.view.shows_line(line)])
        self.out.flush()
        return came

    def mark(self, text: str) -> None:
        """A line of tail itself is printed."""
        line = f"── {clean_line(text)} ──"
        self.out.write(f"\x1b[1m{line}\x1b[0m\n" if self._colour else f"{line}\n")
        self.out.flush()

    def print_plain(self, lines: Sequence[str]) -> None:
        """Lines of tail itself are printed as they are."""
        self.out.writelines(f"{line}\n" for line in lines)
        self.out.flush()

    def _find_files(self) -> None:
        paths = [self.run.batch_log, *self.run.logs.glob("attempt_*/*.log")]
        known = len(self._files)
        for path in paths:
            if path in self._files or not path.is_file():
                continue
            source = parse_log_source(self.run, path)
            if source is not None and self.view.shows_file(source):
                self._files[path] = (source, GrowingFile(path))
        if len(self._files) != known:
            self._files = dict(sorted(self._files.items(), key=lambda item: _order(item[1][0])))

    def _print(self, source: LogSource, lines: Sequence[str]) -> None:
        if lines and source.attempt and source.attempt != self._shown_attempt:
            if self._shown_attempt is not None or source.attempt > 1:
                self.mark(f"attempt {source.attempt}")
            self._shown_attempt = source.attempt
        label = f"{clean_line(source.label)} |"
        if self._colour:
            # Python's own hash changes with every start; a node keeps its colour.
            label = f"\x1b[{_COLOURS[zlib.crc32(source.label.encode()) % len(_COLOURS)]}m{label}\x1b[0m"
        self.out.writelines(f"{label} {redact(line, self._secrets)}\n" for line in lines)


def _order(source: LogSource) -> tuple[int, str, int]:
    return source.attempt, source.node or "", -1 if source.rank is None else source.rank


def share_out(asked: Sequence[int], budget: int) -> list[int]:
    """How many of `budget` lines each asker gets: as equal as can be, nobody more than asked, later ones first."""
    shares = [0] * len(asked)
    while budget > 0 and (open_ones := [i for i, want in enumerate(asked) if shares[i] < want]):
        each = max(1, budget // len(open_ones))
        for i in reversed(open_ones):
            given = min(each, asked[i] - shares[i], budget)
            shares[i] += given
            budget -= given
    return shares


def tail(
    run: RunDir,
    *,
    out: TextIO,
    num_lines: int = 20,
    rank: int | None = None,
    node: str | None = None,
    grep: str | None = None,
    follow: bool = True,
    show_card: bool = True,
    poll_s: float = 0.5,
    state_poll_s: float = 15.0,
) -> int:
    """The run's logs are printed, and followed until the job has ended.

    Returns: the job's own exit code, never 0 for an end that nobody knows; 130 after Ctrl-C, 141 when the reader of
             the output has gone. Without `follow`: 0 for a job that still runs.
    Raises:  UsageError for a bad expression, JobNotFound for a run that was never submitted.
    """
    try:
        pattern = re.compile(grep) if grep is not None else None
    except re.error as e:
        raise UsageError(f"--grep {grep!r} is no regular expression: {e}") from e
    follower = Follower(run, View(num_lines=num_lines, rank=rank, node=node, grep=pattern), out)
    try:
        watch = _Watch(run, follower, show_card=show_card, poll_s=poll_s, state_poll_s=state_poll_s)
        return watch.run_to_end(follow=follow)
    except KeyboardInterrupt:
        out.write(f"\nstopped watching; the job goes on. janus-cluster cancel {run.name} ends it\n")
        out.flush()
        return CTRL_C_EXIT_CODE
    except BrokenPipeError:
        return BROKEN_PIPE_EXIT_CODE


class _Watch:
    """Decides when the job is over: its own status.json at every look, the state ladder now and then."""

    def __init__(self, run: RunDir, follower: Follower, *, show_card: bool, poll_s: float, state_poll_s: float) -> None:
        self.run = run
        self.follower = follower
        self.show_card = show_card
        self.poll_s = poll_s
        self.state_poll_s = state_poll_s
        self.state = self._ask()
        # The last word of an attempt that was requeued since is not the end of the job.
        self._old_word = None if self.state.is_final else load_status(run)
        self._told: tuple[str, str | None] | None = None
        self._unknown_since: float | None = None

    def run_to_end(self, *, follow: bool) -> int:
        if self.state.state == "NOT_SUBMITTED":
            raise JobNotFound(f"{self.run.name} was not submitted yet", hint=self.state.reason)
        self.follower.print_last()
        self._tell()
        if not follow:
            self.follower.print_new(at_end=True)
            running = not self.state.is_final and self.state.state != "UNKNOWN"
            return 0 if running else self._end()
        while not self._is_over():
            self.follower.print_new()
            time.sleep(self.poll_s)
        for _ in range(_DRAIN_LOOKS):
            if not self.follower.print_new():
                break
            time.sleep(self.poll_s)
        self.follower.print_new(at_end=True)
        return self._end()

    def _ask(self) -> JobState:
        self._asked_at = time.monotonic()
        return load_job_states([self.run])[0]

    def _is_over(self) -> bool:
        word = load_status(self.run)
        if word is not None and word.state in FINAL_STATUS and word != self._old_word and self._is_last(word):
            self.state = self._from_own_word(word)
        elif time.monotonic() - self._asked_at >= self.state_poll_s:
            self.state = self._ask()
        self._tell()
        if self.state.state != "UNKNOWN":
            self._unknown_since = None
            return self.state.is_final
        self._unknown_since = self._unknown_since or time.monotonic()
        grace_s = UNREACHABLE_GRACE_S if self.state.source == NOBODY else UNKNOWN_GRACE_S
        return time.monotonic() - self._unknown_since >= grace_s

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
        if self.state.is_final or (self.state.state, self.state.reason) == self._told:
            return
        self._told = (self.state.state, self.state.reason)
        on = f" on {', '.join(self.state.nodes)}" if self.state.nodes else ""
        why = f": {self.state.reason}" if self.state.reason else ""
        self.follower.mark(f"{self.state.state}{on}{why}")

    def _end(self) -> int:
        code = self.state.command_exit_code
        if self.state.is_final:
            self._tell_failure()
        why = f": {self.state.reason}" if self.state.reason else ""
        self.follower.mark(f"{self.state.state} (exit code {code}, says {self.state.source}){why}")
        return code

    def _tell_failure(self) -> None:
        """The card of a failed run is printed, and the nodes that it blames are remembered."""
        from janus_cluster.observe.card import render_card
        from janus_cluster.observe.harvest import remember_bad_nodes
        from janus_cluster.observe.status import RunStatus, add_card

        sent = load_submission(self.run)
        job_id = sent.job_id if sent else None
        status = add_card(RunStatus(run=self.run, job_id=job_id, state=self.state))
        if status.card is None:
            return
        remember_bad_nodes(status)
        if self.show_card:
            self.follower.mark("what failed")
            self.follower.print_plain(render_card(status.card))
