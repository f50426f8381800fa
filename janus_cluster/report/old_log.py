r"""The predecessor's train.log as a History: dict lines of transformers' Trainer and tqdm bars, ranks mixed.

  12%|█▏        | 118/1000 [1:47:35<13:24:10, 54.70s/it]\r
  {'loss': 1.2345, 'grad_norm': 2.1, 'learning_rate': 9.9e-06, 'epoch': 0.12}\n

A dict line has no step: it belongs to the last bar before it. A bar that begins again at 0 is a new attempt. Seconds a
step are the bar's elapsed time between two of its steps, because its own rate is smoothed and, after a resume, counts
steps that were only skipped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from janus_cluster.errors import UsageError
from janus_cluster.report.history import Event, History
from janus_cluster.report.table import Table
from janus_cluster.run.text import clean_line

_BLOCK_BYTES = 1 << 20
# A dict line has about 100 characters, a bar 200; the rest of a longer line (a dump of a tensor) is passed over.
_MAX_LINE_BYTES = 16 * 1024
# Elapsed times are whole seconds: below this tqdm's own rate is more precise than a difference.
_LEAST_ELAPSED_S = 10

_BAR = re.compile(
    r"(?P<percent>\d{1,3})%\|[^|]*\|\s*(?P<step>\d{1,9})/(?P<total>\d{1,9})\s*"
    r"\[(?P<elapsed>[\d:]{4,12})<[^,\]]{1,20},\s*(?P<rate>[\d.]+|\?)(?P<unit>s/it|it/s)"
)
# `Map: ` or `Loading checkpoint shards: ` before a bar: not training. Host names hold digits, ranks brackets.
_DESCRIPTION = re.compile(r"[A-Za-z][A-Za-z ()_=/]*(?:\d*\))?: *$")
_VALUE = re.compile(
    r"'(loss|grad_norm|learning_rate|epoch)':\s*'?([-+]?(?:nan|inf|[\d.]+(?:e[-+]?\d+)?))", re.IGNORECASE
)


@dataclass
class _Reader:
    """What was read so far."""

    steps: Table = field(default_factory=Table)
    events: list[Event] = field(default_factory=list)
    attempt: int = 1
    step: int = 0
    total: int = 0
    # The last bar from which a step time was reckoned; None: the next one only begins.
    since: tuple[int, int] | None = None
    # The row of `step`, not yet in the table: its loss follows its bar.
    row: dict[str, float] | None = None
    last_epoch: float = -1.0
    num_counted: int = 0

    def bar(self, match: re.Match[str]) -> None:
        step, total, elapsed_s = int(match["step"]), int(match["total"]), _seconds(match["elapsed"])
        if step == 0 and elapsed_s == 0 and total == self.total and self.step >= 3:
            self._begin_attempt()
        # An evaluation's bar has another total, and no loss follows it; ranks of other nodes lag behind.
        if (self.total and total != self.total) or step <= self.step:
            if not self._is_first_of_total(total):
                return
            self._restart_with(total)
        if step == 0:
            self.total, self.since = total, (0, elapsed_s)
            return
        self.flush()
        self.total, previous = total, self.step
        is_skip = previous == 0 and step > 1
        self.row = {"step": float(step), "attempt": float(self.attempt), "total_steps": float(total)}
        if not is_skip:
            self.row["step_time_s"] = self._step_time_s(match, step, elapsed_s)
        if is_skip or self.since is None or elapsed_s - self.since[1] >= _LEAST_ELAPSED_S:
            self.since = (step, elapsed_s)
        self.step = step

    def _is_first_of_total(self, total: int) -> bool:
        """True while no loss was seen: the bars so far may have been of something else."""
        return total != self.total and not self.steps.has("loss") and not (self.row and "loss" in self.row)

    def _restart_with(self, total: int) -> None:
        self.steps, self.row, self.step, self.total, self.since = Table(), None, 0, total, None

    def _begin_attempt(self) -> None:
        self.flush()
        self.attempt += 1
        self.step, self.since, self.last_epoch = 0, (0, 0), -1.0
        self.events.append(Event(kind="resume", time=math.nan, attempt=self.attempt, text="the bar begins again"))

    def _step_time_s(self, match: re.Match[str], step: int, elapsed_s: int) -> float:
        if self.since is not None and step > self.since[0] and elapsed_s - self.since[1] >= _LEAST_ELAPSED_S:
            return (elapsed_s - self.since[1]) / (step - self.since[0])
        rate = _float(match["rate"])
        if match["unit"] == "s/it":
            return rate
        return 1 / rate if rate > 0 else math.nan

    def losses(self, line: str) -> None:
        values = {name: _float(text) for name, text in _VALUE.findall(line)}
        epoch = values.pop("epoch", math.nan)
        # Every node prints the same line, and an older one is from a node that lags.
        if "loss" not in values or epoch <= self.last_epoch:
            return
        self.last_epoch = epoch if math.isfinite(epoch) else self.last_epoch
        if self.total == 0:
            self.num_counted += 1
            self.steps.add({"step": float(self.num_counted), "attempt": 1.0} | values)
            return
        if self.row is None:
            self.row = {"step": float(self.step), "attempt": float(self.attempt), "total_steps": float(self.total)}
        self.row = values | self.row

    def flush(self) -> None:
        """The row that was kept back is in the table."""
        if self.row is not None:
            self.steps.add(self.row)
            self.row = None


def load_old_log(path: Path) -> History:
    """The history that a log of the predecessor holds, in one pass and bounded memory. Raises: UsageError."""
    reader = _Reader()
    try:
        for line in _read_lines(path):
            bars = list(_BAR.finditer(line)) if "%|" in line else []
            for match in bars:
                if not _DESCRIPTION.search(line[max(0, match.start() - 60) : match.start()].rstrip(" ") + " "):
                    reader.bar(match)
            if "'loss'" in line:
                reader.losses(line)
    except OSError as e:
        raise UsageError(f"--from-log {path}: {e.strerror}") from e
    reader.flush()
    if not reader.steps.has("loss") and not reader.steps.has("step_time_s"):
        raise UsageError(
            f"--from-log {path}: no bars (`118/1000 [1:47:35<…, 54.70s/it]`) and no losses (`{{'loss': …}}`) in it",
            hint="give the log of the predecessor's training, stderr included: bash train.sh 2>&1 | tee train.log",
        )
    return History(
        name=clean_line(path.name),
        source=clean_line(str(path)),
        steps=reader.steps,
        evaluations=Table(),
        events=reader.events,
        notes=_notes(reader),
    )


def _notes(reader: _Reader) -> list[str]:
    notes = ["read from a log: no configuration, times of day, evaluations, or values of single ranks"]
    if reader.num_counted:
        notes.append("no progress bar in the log: steps are counted by its lines with a loss")
    if reader.steps.stride > 1:
        notes.append(f"of {reader.steps.stride} steps one is shown")
    return notes


def _read_lines(path: Path) -> Iterator[str]:
    """The texts between line feeds and carriage returns, at most _MAX_LINE_BYTES of each; broken UTF-8 is replaced."""
    rest = b""
    with path.open("rb") as f:
        while block := f.read(_BLOCK_BYTES):
            *lines, rest = (rest + block.replace(b"\r", b"\n")).split(b"\n")
            # Of a line without end only the beginning is kept, and below no more of any line is read.
            rest = rest[:_MAX_LINE_BYTES]
            for line in lines:
                if b"%|" in line or b"'loss'" in line:
                    yield clean_line(line[:_MAX_LINE_BYTES].decode("utf-8", errors="replace"))
    if rest:
        yield clean_line(rest.decode("utf-8", errors="replace"))


def _seconds(text: str) -> int:
    """`47:35` and `1:47:35` as seconds."""
    total = 0
    for part in text.split(":"):
        total = total * 60 + int(part or 0)
    return total


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
