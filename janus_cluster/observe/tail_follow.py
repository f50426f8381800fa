"""Read all logs of one run as they grow, and show them in the order of their times."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Sequence
from pathlib import Path

from janus_cluster.observe.liveline import Screen
from janus_cluster.observe.logfile import MAX_BACK_BYTES, GrowingFile, LogLine
from janus_cluster.observe.merge import HOLD_S, Group, Merge
from janus_cluster.observe.noise import classify, shorten_bar
from janus_cluster.observe.tail_view import LogSource, View, parse_log_source, render_label
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.attempt import AttemptRecord
from janus_cluster.run.records.submission import load_status
from janus_cluster.run.stamped import render_stamp
from janus_cluster.run.text import clean_line, load_secrets, redact

_BATCH_COLOUR, _SEVERAL_NODES_COLOUR = 35, 37
_NODE_COLOURS = (36, 33, 32, 94, 96, 93, 92, 34)
# Files of attempts that are over seldom grow: they are looked at this seldom.
_OLD_EVERY = 20
_ATTEMPT_BEGINS = re.compile(r"attempt (\d+) of ")
_BAR_LIVES_S = 30.0


class Follower:
    """The run's logs as far as they have been read, and what is shown of them."""

    def __init__(self, run: RunDir, view: View, screen: Screen) -> None:
        self.run = run
        self.view = view
        self.screen = screen
        # Steps become the live line, where there is one to become.
        self.folds_steps = False
        self.last_step = ""
        self.num_left_out = 0
        self._bar, self._bar_at = "", 0.0
        self._files: dict[Path, tuple[LogSource, GrowingFile]] = {}
        # Sources with logs that the view leaves out.
        self._others: set[LogSource] = set()
        self._merge = Merge(collapses=not view.raw)
        self._newest_attempt = 0
        self._shown_attempt = 0
        self._num_looks = 0
        # For lines of long ago, no more equal ones are to come.
        self._reads_past = view.num_lines is None
        self._secrets = load_secrets(run)
        # In the order of the allocation: a node's place decides its colour.
        self._nodes: list[str] = []

    @property
    def has_more(self) -> bool:
        """Whether there is something unread now."""
        return any(file.has_more for _, file in self._files.values())

    @property
    def bar(self) -> str:
        """The progress bar that moved last, in short; empty when none has moved lately."""
        return self._bar if time.monotonic() - self._bar_at < _BAR_LIVES_S else ""

    def print_last(self) -> None:
        """Print the last lines of what is there now, or prepare to print all since the view's time."""
        self._find_files()
        self._show_what_there_is()
        since, num_lines = self.view.since, self.view.num_lines
        if num_lines is None:
            for _, file in self._files.values():
                file.start_at_time(since or 0.0)
            return
        now = time.monotonic()
        # Equal lines of all ranks become one.
        most = num_lines * max(1, *self._count_sources())
        num_found, enough_in = 0, 0
        for source, file in sorted(self._files.values(), key=lambda pair: -pair[0].attempt):
            # Earlier attempts had ended by then, and may be many.
            if 0 < source.attempt < enough_in:
                file.skip_to_end()
                continue
            lines = file.start_at_end(num_lines, self._is_shown)
            self._merge.add(source, [line for line in lines if since is None or line.time >= since], now=now)
            num_found += len(lines) if source.attempt else 0
            if num_found >= most and not enough_in:
                enough_in = source.attempt
        groups = self._merge.take(now=now, everything=True)
        if len(groups) < num_lines and any(file.fell_short for _, file in self._files.values()):
            self.mark(
                f"fewer than {num_lines} lines are in the last {MAX_BACK_BYTES >> 20} MB of each log; "
                "--since 1d looks further back"
            )
        self._show(groups[len(groups) - min(num_lines, len(groups)) :])
        self.screen.flush()

    def print_new(self, *, at_end: bool = False) -> bool:
        """Print what is new. Returns: whether there was anything new."""
        self._find_files()
        now = time.monotonic()
        has_new = False
        behind = [source for source, file in self._files.values() if file.has_more]
        until = min((self._merge.newest_of(source) for source in behind), default=None)
        for source, file in self._files.values():
            # The others are waited for, so that the lines of the file that is ahead do not fill the memory.
            if file.has_more and until is not None and self._merge.newest_of(source) > until:
                continue
            is_due = file.has_more or (file.is_due(now) and self._is_current(source))
            if not at_end and not is_due:
                continue
            before = file.offset
            lines, was_cut = file.read_new()
            has_new = has_new or was_cut or file.offset != before
            if was_cut:
                self.mark(f"{source.label}: the log was cut short or replaced; from its beginning:")
            lines += file.read_partial(at_end=at_end)
            wanted = [line for line in lines if self._is_shown(line, is_new=True)]
            self._merge.add(source, wanted, now=now, read_to=lines[-1].time if lines else 0.0)
        self._num_looks += 1
        self._show(self._take(now, at_end=at_end))
        self.screen.flush()
        return has_new

    def print_held(self) -> None:
        """Print the lines that waited for others to join them."""
        self._show(self._merge.take(now=time.monotonic(), everything=True))

    def mark(self, text: str) -> None:
        """Print a line of tail itself."""
        line = f"── {redact(clean_line(text), self._secrets)} ──"
        self.screen.write([f"\x1b[1m{line}\x1b[0m" if self.screen.has_colours else line])
        self.screen.flush()

    def _take(self, now: float, *, at_end: bool) -> list[Group]:
        behind = [source for source, file in self._files.values() if file.has_more]
        if behind:
            until = min(self._merge.newest_of(source) for source in behind)
            return self._merge.take(now=now, until=until, everything=True)
        groups = self._merge.take(now=now, everything=at_end or self._reads_past)
        self._reads_past = False
        return groups

    def _is_shown(self, line: LogLine, *, is_new: bool = False) -> bool:
        if self.view.shows_line(line.text, folds_steps=self.folds_steps):
            return True
        if is_new and self.view.grep is None:
            kind = classify(line.text)
            if kind == "bar":
                self._bar, self._bar_at = redact(shorten_bar(line.text), self._secrets), time.monotonic()
            elif kind == "step":
                self.last_step = redact(line.text, self._secrets)
            elif kind == "chatter":
                self.num_left_out += 1
        return False

    def _is_current(self, source: LogSource) -> bool:
        return source.attempt in (0, self._newest_attempt) or self._num_looks % _OLD_EVERY == 0

    def _find_files(self) -> None:
        attempts = self.run.attempts()
        newest = max(attempts, default=0)
        paths = [self.run.batch_log] if self.run.batch_log not in self._files else []
        for attempt in attempts:
            if attempt >= self._newest_attempt or self._num_looks % _OLD_EVERY == 0:
                # The folder may be removed between the two looks; the next look finds the run gone.
                with contextlib.suppress(FileNotFoundError):
                    paths += [p for p in self.run.attempt_logs(attempt).glob("*.log") if p not in self._files]
        self._newest_attempt = newest
        found = {}
        for path in paths:
            source = parse_log_source(self.run, path)
            if source is not None and path.is_file():
                if self.view.shows_file(source):
                    found[path] = (source, GrowingFile(path))
                elif source.attempt:
                    self._others.add(source)
        if found:
            self._files = dict(sorted((self._files | found).items(), key=lambda item: item[1][0].order))
            # A single source prints no line twice.
            self._merge.hold_s = HOLD_S if max(self._count_sources()) > 1 else 0.0

    def _show_what_there_is(self) -> None:
        """List the nodes and ranks that have logs, for a mistyped one; one whose log comes later is still shown."""
        if self._files or not self._others:
            return
        view = self.view
        requested = [
            *([f"node {view.node}"] if view.node else []),
            *([f"rank {view.rank}"] if view.rank is not None else []),
        ]
        self.mark(
            f"no log of {', '.join(requested)} is here yet; there are those of {render_label(list(self._others))}"
        )

    def _count_sources(self) -> tuple[int, int]:
        """How many ranks there are, and how many nodes."""
        sources = [source for source, _ in self._files.values()]
        return len({s.rank for s in sources} - {None}), len({s.node for s in sources} - {None})

    def _show(self, groups: Sequence[Group]) -> None:
        lines: list[str] = []
        for group in groups:
            attempt = group.sources[0].attempt
            if not attempt and (begun := _ATTEMPT_BEGINS.match(group.text)):
                attempt = int(begun[1])
            if attempt > self._shown_attempt:
                self.last_step = ""
                if self._shown_attempt or attempt > 1:
                    self.screen.write(lines)
                    lines = []
                    self.mark(self._describe_attempt(attempt))
                self._shown_attempt = attempt
            lines.append(self._render(group))
        self.screen.write(lines)

    def _describe_attempt(self, attempt: int) -> str:
        if (record := AttemptRecord.load(self.run.attempt_json(attempt))) is None:
            return f"attempt {attempt}"
        start = f"on from step {record.from_step}" if record.from_step else "from the beginning"
        return f"attempt {attempt}, {start}"

    def _choose_colour(self, group: Group) -> int:
        """The colour of the line's node, the same at every call for the same run."""
        first, *others = {source.node for source in group.sources}
        if others:
            return _SEVERAL_NODES_COLOUR
        if first is None:
            return _BATCH_COLOUR
        if first not in self._nodes:
            status = load_status(self.run)
            known = status.nodes if status else ()
            self._nodes += [n for n in (*known, first) if n not in self._nodes]
        return _NODE_COLOURS[self._nodes.index(first) % len(_NODE_COLOURS)]

    def _render(self, group: Group) -> str:
        first, is_alone = group.sources[0], len(group.sources) == 1
        label = f"{clean_line(first.label if is_alone else render_label(group.sources))} |"
        if self.screen.has_colours:
            label = f"\x1b[{self._choose_colour(group)}m{label}\x1b[0m"
        text = redact(group.text, self._secrets)
        if self.view.raw and group.is_stamped:
            text = f"{render_stamp(group.time)} {text}"
        count = "" if is_alone else f"  ×{len(group.sources)}"
        return f"{label} {text}{count}"
