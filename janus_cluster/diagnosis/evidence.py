"""Read a failed attempt's files with bounds: torchrun's error files and tables, the logs' last lines.

torchrun writes torchrun/<node>/<run>/attempt_0/<local rank>/error.json for a rank that raised, and a table at the end
of its agent's log (<node>.log) with the exit code of every rank of the node. A rank that was killed has no error file.
Its times are whole seconds and tie between ranks, so the error file's modification time orders them.
Source: torch/distributed/elastic/multiprocessing/errors, torch 2.13, and files that it wrote.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from janus_cluster.diagnosis.stall import Stall, judge_stall, load_stalls
from janus_cluster.errors import FailureKind
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.attempt import AttemptRecord
from janus_cluster.run.records.failure import RankFailure, ScriptFailure
from janus_cluster.run.records.submission import Submission, SubmissionRecord
from janus_cluster.run.stamped import strip_stamps
from janus_cluster.run.text import clean, clean_line, redact

# The last error of a log is near its end; a rank of a big job may have written gigabytes before.
TAIL_BYTES = 64 * 1024
_LARGEST_ERROR_FILE = 1024 * 1024
_MOST_ERROR_FILES = 256
# A traceback with more lines after it was an error that the rank survived.
_MOST_LINES_AFTER = 40

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
    """An exception that a rank raised. Units: time epoch seconds. `frames`: the last ones, two lines each at most.

    `type`, `hint`, `kind` and `is_follow_up` come from the rank's own record alone.
    """

    node: str
    rank: int | None
    time: float
    message: str
    frames: tuple[str, ...] = ()
    type: str | None = None
    hint: str | None = None
    kind: FailureKind | None = None
    is_follow_up: bool = False


@dataclass(frozen=True, kw_only=True)
class RankExit:
    """How a rank's process ended, as torchrun saw it: `code` is negative for a signal.

    `was_closed`: torchrun itself ended it, because another rank of the node had failed.
    """

    node: str
    rank: int
    code: int
    was_closed: bool = False


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything that is known of one ended attempt. `kind`: of the error that the attempt ended with."""

    state: str
    kind: FailureKind | None = None
    exit_code: int | None = None
    reason: str | None = None
    nodes: tuple[str, ...] = ()
    errors: tuple[RankError, ...] = ()
    exits: tuple[RankExit, ...] = ()
    # Last lines by where they come from: "batch", "h800-01", "h800-01:3".
    logs: tuple[tuple[str, str], ...] = ()
    # Global rank → its node, of every rank that began.
    ranks: tuple[tuple[int, str], ...] = ()
    # Why job.sbatch ended before the attempt could begin.
    script: ScriptFailure | None = None
    # The hang for which the attempt ended the ranks.
    hang: RankError | None = None
    # The collective that did not finish, where the ranks wrote of one before its time-out.
    stall: Stall | None = None


def load_rank_failures(run: RunDir, attempt: int) -> list[RankError]:
    """The exceptions that the ranks themselves recorded."""
    found = (RankFailure.load(path) for path in run.rank_failures(attempt)[:_MOST_ERROR_FILES])
    return [
        RankError(
            node=failure.node,
            rank=failure.rank,
            time=failure.time,
            message=_without_location(f"{failure.type}: {failure.message}"),
            frames=parse_frames(failure.traceback),
            type=failure.type,
            hint=failure.hint,
            kind=failure.kind,
            is_follow_up=failure.is_follow_up,
        )
        for failure in found
        if failure is not None
    ]


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
        reported = float(info["timestamp"])
        # Its own clock counts for the second, the file's time for the fraction, unless they are of different clocks.
        when = written if 0 <= written - reported < 2 else reported
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
    closed = {int(pid) for pid in _CLOSED_BY_TORCHRUN.findall(text)}
    # Of several tables (the gate's probe wrote one, too) the last counts.
    table = text[text.rfind("ChildFailedError") :] if "ChildFailedError" in text else ""
    return [
        RankExit(node=node, rank=int(m["rank"]), code=int(m["code"]), was_closed=int(m["pid"]) in closed)
        for m in _ENTRY.finditer(table)
    ]


def parse_last_exception(text: str, node: str, rank: int | None, *, time: float) -> RankError | None:
    """The exception of the last traceback in a log; for a rank that left no error file."""
    at = text.rfind("Traceback (most recent call last):")
    if at < 0:
        return None
    lines = text[at:].split("\n")[1:]
    end = next((i for i, line in enumerate(lines) if line and not line.startswith(" ")), None)
    if end is None or _RAISED.match(lines[end]) is None or len(lines) - end > _MOST_LINES_AFTER:
        return None
    # A traceback names the exception with its module, torchrun's file without.
    message = re.sub(r"^(?:[A-Za-z_]\w*\.)+(?=\w+(?::|$))", "", lines[end])
    frames = parse_frames("\n".join(lines[:end]))
    return RankError(node=node, rank=rank, time=time, message=_without_location(message), frames=frames)


def parse_frames(stack: str) -> tuple[str, ...]:
    """The last three frames of a traceback, innermost last: the place and the line of code."""
    lines = [line for line in stack.split("\n") if line.strip(" ^~")]
    frames: list[list[str]] = []
    for line in lines:
        if _FRAME.match(line):
            frames.append([line.strip()])
        elif frames and line.startswith("    ") and len(frames[-1]) == 1:
            frames[-1].append("  " + line.strip())
    # The wrappers of torchrun and c10d are in every traceback and explain nothing.
    own = [frame for frame in frames if not _WRAPPER.search(frame[0])] or frames
    return tuple(text for frame in own[-3:] for text in frame)


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
    kind: FailureKind | None = None,
) -> Evidence:
    """Everything the run folder holds on the attempt, sanitised and with secrets redacted.

    A rank's error is the one that it recorded itself; else torchrun's error file, else the end of its log.
    """
    sent = SubmissionRecord.load(run.submission_json)
    # `resume` appends to what is there.
    start = max(0, sent.batch_log_bytes) if sent else 0
    logs = [("batch", _this_attempt(read_tail(run.batch_log, secrets=secrets, start=start), attempt))]
    errors: list[RankError] = []
    exits: list[RankExit] = []
    ranks: dict[int, str] = {}
    recorded = load_rank_failures(run, attempt) if attempt is not None else []
    for node in _nodes_of(run, attempt, nodes) if attempt is not None else []:
        mine = _ranks_of(run, attempt or 0, node)
        ranks |= dict.fromkeys(mine, node)
        agent = read_tail(run.node_log(attempt or 0, node), secrets=secrets)
        logs.append((node, agent))
        exits += parse_exits(agent, node)
        raised = [e for e in recorded if e.node == node]
        known = {e.rank for e in raised} | ({None} if raised else set())
        raised += [e for e in load_rank_errors(run, attempt or 0, node, mine) if e.rank not in known]
        for rank in mine:
            path = run.rank_log(attempt or 0, node, rank)
            text = read_tail(path, secrets=secrets)
            logs.append((f"{node}:{rank}", text))
            parsed = parse_last_exception(text, node, rank, time=_written_at(path))
            if parsed is not None and rank not in {e.rank for e in raised}:
                raised.append(parsed)
        errors += raised
    return Evidence(
        state=state,
        kind=kind,
        exit_code=exit_code,
        reason=redact(clean(reason), secrets) if reason else None,
        nodes=tuple(nodes),
        errors=tuple(_shown(error, secrets) for error in errors),
        exits=tuple(exits),
        logs=tuple(logs),
        ranks=tuple(sorted(ranks.items())),
        script=_load_script_failure(run, sent, secrets),
        hang=None if (hang := _load_hang(run, attempt)) is None else _shown(hang, secrets),
        stall=_load_stall(run, attempt, ranks),
    )


def _load_hang(run: RunDir, attempt: int | None) -> RankError | None:
    record = AttemptRecord.load(run.attempt_json(attempt or 0))
    if record is None or (hang := record.hang) is None:
        return None
    message = "\n".join(line for line in (hang.message, hang.collective) if line)
    return RankError(node=clean(hang.node or ""), rank=hang.rank, time=0.0, message=message, frames=hang.frames)


def _load_stall(run: RunDir, attempt: int | None, ranks: Mapping[int, str]) -> Stall | None:
    """Of a hang, the attempt has judged the same records when it found it."""
    if attempt is None or not ranks or not run.stall(attempt).is_dir():
        return None
    world_size = max(ranks) + 1
    return judge_stall(load_stalls(run, attempt=attempt, world_size=world_size), world_size=world_size, nodes=ranks)


def _shown(error: RankError, secrets: dict[str, str]) -> RankError:
    """The same error sanitised: its text is as untrusted as the logs."""
    return replace(
        error,
        message="\n".join(redact(clean(line), secrets) for line in error.message.split("\n")),
        frames=tuple(redact(clean(line), secrets) for line in error.frames),
        hint=redact(clean_line(error.hint), secrets) if error.hint else None,
    )


def _load_script_failure(run: RunDir, sent: Submission | None, secrets: dict[str, str]) -> ScriptFailure | None:
    """Why job.sbatch ended; None where it did not, or only in an earlier submission."""
    failure = ScriptFailure.load(run.script_failure_json)
    if failure is None or (sent is not None and sent.job_id not in (None, failure.job_id)):
        return None
    return replace(failure, node=clean_line(failure.node), message=redact(clean_line(failure.message), secrets))


def _this_attempt(batch: str, attempt: int | None) -> str:
    """The batch log from the attempt's own first line on: a requeued job appends to that of the one before."""
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
    """The message without the place in gloo's or torch's own sources."""
    return re.sub(r"^(\w+: )\[/?[^\]\s]*\.(?:cc|cpp|cu|h):\d+\] ", r"\1", message)
