"""What a failed attempt left behind, read with bounds: torchrun's error files and tables, the logs' last lines.

torchrun writes torchrun/<node>/<run>/attempt_0/<local rank>/error.json for a rank that raised, and a table at the end
of its agent's log (<node>.log) with the exit code of every rank of the node. A rank that was killed has no error file.
Its times are whole seconds and tie between ranks, so the error file's own time of writing parts them.
Source: torch/distributed/elastic/multiprocessing/errors, torch 2.13, and files that it wrote.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from janus_cluster.observe.text import clean, redact
from janus_cluster.rundir import RunDir, read_json
from janus_cluster.stamped import strip_stamps

# The last words of a log are near its end; a rank of a big job may have written gigabytes before.
TAIL_BYTES = 64 * 1024
_LARGEST_ERROR_FILE = 1024 * 1024
_MOST_ERROR_FILES = 256
# A traceback with more lines after it was an error that the rank lived through.
_MOST_LAST_WORDS = 40

_ENTRY = re.compile(
    r"^\s*rank\s*: (?P<rank>\d+) \(local_rank: \d+\)\s*\n\s*exitcode\s*: (?P<code>-?\d+) \(pid: (?P<pid>\d+)\)",
    re.MULTILINE,
)
_CLOSED_BY_TORCHRUN = re.compile(r"Sending process (\d+) closing signal")
_FRAME = re.compile(r'^  File ".*", line \d+')
_WRAPPER = re.compile(r"torch/distributed/(?:elastic/|c10d_logger\.py|distributed_c10d\.py)|run_and_leave$")
_RAISED = re.compile(r"^(?P<type>[A-Za-z_][\w.]*)(?:: (?P<text>.*))?$", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class RankError:
    """An exception that a rank raised. Units: time epoch seconds. `frames`: the last ones, two lines each at most."""

    node: str
    rank: int | None
    time: float
    message: str
    frames: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RankExit:
    """How a rank's process ended, as torchrun saw it: `code` is negative for a signal.

    `was_told`: torchrun itself ended it, because another rank of the node had failed.
    """

    node: str
    rank: int
    code: int
    was_told: bool = False


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything that the classifier is told of one ended attempt."""

    state: str
    exit_code: int | None = None
    reason: str | None = None
    nodes: tuple[str, ...] = ()
    errors: tuple[RankError, ...] = ()
    exits: tuple[RankExit, ...] = ()
    # Last lines by where they come from: "batch", "h800-01", "h800-01:3".
    logs: tuple[tuple[str, str], ...] = ()
    # Global rank → its node, of every rank that began.
    ranks: tuple[tuple[int, str], ...] = ()
    # What the attempt saw when the ranks stood still, and ended them for.
    hang: RankError | None = None


def load_rank_errors(run: RunDir, attempt: int, node: str, ranks: list[int]) -> list[RankError]:
    """The error files of one node. `ranks` are the global ranks of the node, ascending: the local rank is the index."""
    found: list[RankError] = []
    folder = run.torchrun_logs(attempt, node)
    for path in sorted(folder.rglob("error.json"))[:_MOST_ERROR_FILES]:
        local = int(path.parent.name) if path.parent.name.isdigit() else None
        rank = ranks[local] if local is not None and local < len(ranks) else None
        error = _load_error_file(path, node, rank)
        if error is not None:
            found.append(error)
    return found


def _load_error_file(path: Path, node: str, rank: int | None) -> RankError | None:
    try:
        written = path.stat().st_mtime
        with path.open("rb") as f:
            value = json.loads(f.read(_LARGEST_ERROR_FILE))["message"]
        info = value["extraInfo"]
        told = float(info["timestamp"])
        # Its own clock counts for the second, the file's time for the fraction, unless they are of different clocks.
        when = written if 0 <= written - told < 2 else told
        stack = str(info["py_callstack"])
        return RankError(
            node=node,
            rank=rank,
            time=when,
            message=_without_location(str(value["message"])),
            frames=parse_frames(stack),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def parse_exits(text: str, node: str) -> list[RankExit]:
    """The table at the end of a torchrun agent's log."""
    told = {int(pid) for pid in _CLOSED_BY_TORCHRUN.findall(text)}
    # Of several tables (the gate's probe wrote one, too) the last counts.
    table = text[text.rfind("ChildFailedError") :] if "ChildFailedError" in text else ""
    return [
        RankExit(node=node, rank=int(m["rank"]), code=int(m["code"]), was_told=int(m["pid"]) in told)
        for m in _ENTRY.finditer(table)
    ]


def parse_last_exception(text: str, node: str, rank: int | None, *, time: float) -> RankError | None:
    """The exception of the last traceback in a log; for a rank that left no error file."""
    at = text.rfind("Traceback (most recent call last):")
    if at < 0:
        return None
    lines = text[at:].split("\n")[1:]
    end = next((i for i, line in enumerate(lines) if line and not line.startswith(" ")), None)
    if end is None or _RAISED.match(lines[end]) is None or len(lines) - end > _MOST_LAST_WORDS:
        return None
    # A traceback names the exception with its module, torchrun's file without.
    message = re.sub(r"^(?:[A-Za-z_]\w*\.)+(?=\w+(?::|$))", "", lines[end])
    frames = parse_frames("\n".join(lines[:end]))
    return RankError(node=node, rank=rank, time=time, message=_without_location(message), frames=frames)


def parse_frames(stack: str, *, most: int = 3) -> tuple[str, ...]:
    """The last `most` frames of a traceback, innermost last: the place and the line of code."""
    lines = [line for line in stack.split("\n") if line.strip(" ^~")]
    frames: list[list[str]] = []
    for line in lines:
        if _FRAME.match(line):
            frames.append([line.strip()])
        elif frames and line.startswith("    ") and len(frames[-1]) == 1:
            frames[-1].append("  " + line.strip())
    # The wrappers of torchrun and c10d stand in every traceback and say nothing.
    telling = [frame for frame in frames if not _WRAPPER.search(frame[0])] or frames
    return tuple(text for frame in telling[-most:] for text in frame)


def read_tail(path: Path, *, secrets: dict[str, str], start: int = 0) -> str:
    """The last TAIL_BYTES of a log, from `start` on, as clean text without the lines' times; empty for none."""
    try:
        with path.open("rb") as f:
            size = f.seek(0, 2)
            f.seek(max(start if start <= size else 0, size - TAIL_BYTES))
            data = f.read(TAIL_BYTES)
    except OSError:
        return ""
    text = data.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")
    return redact("\n".join(clean(line) for line in strip_stamps(text).split("\n")), secrets)


def load_evidence(
    run: RunDir,
    *,
    attempt: int | None,
    state: str,
    exit_code: int | None,
    reason: str | None,
    nodes: Iterable[str],
    secrets: dict[str, str],
) -> Evidence:
    """What the run folder holds of the attempt, every text clean and without secrets."""
    logs = [("batch", _this_attempt(read_tail(run.batch_log, secrets=secrets, start=_log_start(run)), attempt))]
    errors: list[RankError] = []
    exits: list[RankExit] = []
    ranks: dict[int, str] = {}
    for node in _nodes_of(run, attempt, nodes) if attempt is not None else []:
        mine = _ranks_of(run, attempt or 0, node)
        ranks |= dict.fromkeys(mine, node)
        agent = read_tail(run.node_log(attempt or 0, node), secrets=secrets)
        logs.append((node, agent))
        exits += parse_exits(agent, node)
        raised = load_rank_errors(run, attempt or 0, node, mine)
        for rank in mine:
            path = run.rank_log(attempt or 0, node, rank)
            text = read_tail(path, secrets=secrets)
            logs.append((f"{node}:{rank}", text))
            told = parse_last_exception(text, node, rank, time=_written_at(path))
            if told is not None and rank not in {e.rank for e in raised}:
                raised.append(told)
        errors += raised
    return Evidence(
        state=state,
        exit_code=exit_code,
        reason=redact(clean(reason), secrets) if reason else None,
        nodes=tuple(nodes),
        errors=tuple(_shown(error, secrets) for error in errors),
        exits=tuple(exits),
        logs=tuple(logs),
        ranks=tuple(sorted(ranks.items())),
        hang=_load_hang(run, attempt),
    )


def _load_hang(run: RunDir, attempt: int | None) -> RankError | None:
    try:
        told = read_json(run.attempt_json(attempt or 0))["hang"]
        rank = None if told["rank"] is None else int(told["rank"])
        return RankError(node=clean(str(told["node"] or "")), rank=rank, time=0.0, message=clean(str(told["message"])))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _shown(error: RankError, secrets: dict[str, str]) -> RankError:
    """The same error in clean text: its files came from others as the logs did."""
    return RankError(
        node=error.node,
        rank=error.rank,
        time=error.time,
        message="\n".join(redact(clean(line), secrets) for line in error.message.split("\n")),
        frames=tuple(redact(clean(line), secrets) for line in error.frames),
    )


def _log_start(run: RunDir) -> int:
    """Where in the batch log the last submission's words begin: `resume` appends to what is there."""
    try:
        return max(0, int(read_json(run.submission_json)["batch_log_bytes"]))
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _this_attempt(batch: str, attempt: int | None) -> str:
    """The batch log from the attempt's own first line on: a requeued job appends to the words of the one before."""
    found = list(re.finditer(rf"^attempt {attempt} of ", batch, re.MULTILINE))
    return batch[found[-1].start() :] if found else batch


def _nodes_of(run: RunDir, attempt: int | None, nodes: Iterable[str]) -> list[str]:
    """The nodes that are known, and those that left a log."""
    found = list(nodes)
    if attempt is not None:
        logs = sorted(run.attempt_logs(attempt).glob("*.log"))
        found += [m[1] for p in logs if (m := re.fullmatch(r"(.+?)(?:\.rank\d+)?\.log", p.name))]
    return list(dict.fromkeys(found))


def _ranks_of(run: RunDir, attempt: int, node: str) -> list[int]:
    pattern = re.compile(re.escape(node) + r"\.rank(\d+)\.log")
    names = (pattern.fullmatch(p.name) for p in run.attempt_logs(attempt).glob("*.log"))
    return sorted(int(m[1]) for m in names if m)


def _written_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _without_location(message: str) -> str:
    """The message without the place in gloo's or torch's own sources, which helps nobody here."""
    return re.sub(r"^(\w+: )\[/?[^\]\s]*\.(?:cc|cpp|cu|h):\d+\] ", r"\1", message)
