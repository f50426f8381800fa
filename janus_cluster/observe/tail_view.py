"""Which part of a run's logs is shown: files, lines, and from when on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path

from janus_cluster.errors import UsageError
from janus_cluster.observe.noise import classify
from janus_cluster.run.hosts import fold_nodes
from janus_cluster.run.paths import RunDir

_SPAN_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, kw_only=True)
class LogSource:
    """Where a log file's lines come from; attempt 0 is the batch script's own log."""

    attempt: int
    node: str | None
    rank: int | None

    @cached_property
    def label(self) -> str:
        return render_label([self])

    @cached_property
    def order(self) -> tuple[int, str, int]:
        return self.attempt, self.node or "", -1 if self.rank is None else self.rank


@dataclass(frozen=True, kw_only=True)
class View:
    """Which lines are shown. `num_lines` None: all since `since`. Units: since epoch seconds."""

    num_lines: int | None = 20
    rank: int | None = None
    node: str | None = None
    grep: re.Pattern[str] | None = None
    since: float | None = None
    raw: bool = False

    @property
    def shows_all(self) -> bool:
        """Whether nothing is left out but earlier lines and noise."""
        return not self.raw and self.grep is None and self.rank is None and self.node is None

    def shows_file(self, source: LogSource) -> bool:
        """Whether any of the file's lines are shown."""
        if self.rank is not None and source.rank != self.rank:
            return False
        return self.node is None or source.node == self.node

    def shows_line(self, text: str, *, folds_steps: bool = False) -> bool:
        """Whether the line is shown. A line that matches the expression is no noise, except for progress bars."""
        if self.grep is not None and self.grep.search(text) is None:
            return False
        if self.raw:
            return True
        kind = classify(text)
        if kind is None:
            return True
        return kind != "bar" if self.grep is not None else kind == "step" and not folds_steps


def parse_log_source(run: RunDir, path: Path) -> LogSource | None:
    """The source that the file's place and name give; None for a file that is no log of ours."""
    if path == run.batch_log:
        return LogSource(attempt=0, node=None, rank=None)
    attempt = re.fullmatch(r"attempt_(\d+)", path.parent.name)
    name = re.fullmatch(r"(?P<node>.+?)(?:\.rank(?P<rank>\d+))?\.log", path.name)
    if attempt is None or name is None:
        return None
    rank = int(name["rank"]) if name["rank"] else None
    return LogSource(attempt=int(attempt.group(1)), node=name["node"], rank=rank)


def render_label(sources: Sequence[LogSource]) -> str:
    """`batch`, `h800-01`, `h800-01:3`; of several with equal lines `h800-01,02:0-15`, `h800-[01-04]:0-31`."""
    if len(sources) == 1 and sources[0].node is not None:
        source = sources[0]
        return f"{source.node}:{source.rank}" if source.rank is not None else f"{source.node}"
    nodes = sorted({s.node for s in sources if s.node is not None})
    ranks = sorted({s.rank for s in sources if s.rank is not None})
    if not nodes:
        return "batch"
    return _join_nodes(nodes) + (f":{_join_ranks(ranks)}" if ranks else "")


def _join_nodes(nodes: Sequence[str]) -> str:
    """`h800-01,02`: of two names that differ in their last number only the first one is written in full."""
    if len(nodes) > 2:
        return fold_nodes(nodes).replace(", ", ",")
    stem = re.sub(r"\d+$", "", nodes[0])
    if stem != nodes[0] and all(re.fullmatch(r"\d+", node.removeprefix(stem)) for node in nodes):
        return ",".join([nodes[0], *(node.removeprefix(stem) for node in nodes[1:])])
    return ",".join(nodes)


def _join_ranks(ranks: Sequence[int]) -> str:
    """`0-7,9`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def parse_since(text: str, *, now: float) -> float:
    """Epoch seconds of `10m` ago, of `14:05` (this reader's time, the last one there was), or of an ISO time.

    Raises: UsageError for anything else.
    """
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text):
        return now - float(found[1]) * _SPAN_S[found[2]]
    try:
        if re.fullmatch(r"\d{1,2}:\d\d(?::\d\d)?", text):
            hour, minute, second = (int(n) for n in [*text.split(":"), "0"][:3])
            today = datetime.fromtimestamp(now)
            moment = today.replace(hour=hour, minute=minute, second=second, microsecond=0)
            return (moment if moment.timestamp() <= now else moment - timedelta(days=1)).timestamp()
        # Python 3.10 reads no Z.
        return datetime.fromisoformat(re.sub("Z$", "+00:00", text)).timestamp()
    except ValueError:
        raise UsageError(
            f"--since {text!r} is no time", hint="10m, 2h, 1d, 14:05, 2026-11-21T14:05 or 2026-11-21T14:05:00Z"
        ) from None
