"""Classify a failed attempt from evidence: which class, which rank and node first, and its message. Pure.

Sources in the order of trust: what Slurm did to the job; a gate or script that ended it; an error of one rank's own; a
signal; a time-out; and last the ranks that only noticed that another was gone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from signal import SIGTERM, Signals

from janus_cluster.diagnosis.evidence import Evidence, RankError, RankExit
from janus_cluster.diagnosis.killed import advise_on_signal, find_killed_agent, oom_line
from janus_cluster.diagnosis.known_errors import KNOWN, advice_for, find_known
from janus_cluster.errors import FailureKind
from janus_cluster.job.setup import advise_on_setup
from janus_cluster.run.records.failure import FailureRecord

# What Slurm did, by the state of the job and by its messages in the batch log.
SLURM_STATES: Mapping[str, FailureKind] = {
    "TIMEOUT": "walltime",
    "DEADLINE": "walltime",
    "PREEMPTED": "preempted",
    "NODE_FAIL": "node_lost",
    "BOOT_FAIL": "node_lost",
    "OUT_OF_MEMORY": "host_out_of_memory",
}
_SLURM_PATTERNS: tuple[tuple[re.Pattern[str], FailureKind], ...] = (
    (re.compile(r"CANCELLED AT \S+ DUE TO TIME LIMIT"), "walltime"),
    (re.compile(r"CANCELLED AT \S+ DUE TO PREEMPTION"), "preempted"),
    (re.compile(r"(?:CANCELLED AT|FAILED) \S* ?DUE TO NODE FAILURE|[Nn]ode failure on \S+|\bNODE_FAIL\b"), "node_lost"),
    (re.compile(r"[Dd]etected \d+ oom[-_ ]kill event|\boom[-_]kill\b"), "host_out_of_memory"),
)
_LOST_NODE = re.compile(r"[Nn]ode failure on (\S+)|Node (\S+) not responding|launch failed on (\S+)")

# Messages of other programs: torch, CUDA, NCCL, the kernel. The first pattern that fits wins: surer ones are first.
_PATTERNS: tuple[tuple[re.Pattern[str], FailureKind], ...] = (
    *((known.pattern, known.kind) for known in KNOWN),
    (re.compile(r"\bXid\b.{0,40}?: ?\d+|uncorrectable (?:ECC|NVLink) error|GPU has fallen off the bus"), "xid"),
    (
        re.compile(r"\bOutOfMemoryError\b|CUDA(?: error:)? out of memory|CUBLAS_STATUS_ALLOC"
                   r"|Cuda failure (?:\d+ )?'out of memory'"),
        "gpu_out_of_memory",
    ),
    (
        re.compile(r"\bDataLoader worker \(pid|unable to \w+ (?:a )?shared memory"
                   r"|AF_UNIX path too long|insufficient shared memory|Pin memory thread"),
        "loader",
    ),
    (
        re.compile(r"No space left on device|\[Errno 28\]|os error 28|Disk quota exceeded|\[Errno 122\]"
                   r"|PytorchStreamWriter failed|inline_container\.cc.*unexpected pos|file write failed"),
        "disk_full",
    ),
    (re.compile(r"Read-only file system|\[Errno 30\]|os error 30\b"), "read_only"),
    (
        re.compile(r"Stale (?:NFS )?file handle|\[Errno (?:5|107|108|112|116|121)\]|os error (?:5|107|108|116)\b"
                   r"|Input/output error|the run folder \S.* is gone"),
        "file_system",
    ),
    (
        re.compile(r"^MemoryError\b|DefaultCPUAllocator: can't allocate memory|Cannot allocate memory|\[Errno 12\]"
                   r"|\bstd::bad_alloc\b|Unable to allocate [\d.]+ \w+ for an array"
                   r"|memory allocation of \d+ bytes failed|oom_kill of its memory cgroup|Memory cgroup out of memory"),
        "host_out_of_memory",
    ),
    (
        re.compile(r"collective operation timeout|before timing out|Timed out waiting \d+ ?ms for (?:send|recv)"
                   r"|Wait timeout|Socket Timeout|wait timeout after \d+"),
        "nccl_timeout",
    ),
    (re.compile(r"DataLoader timed out"), "hang"),
    (re.compile(r"ncclSystemError|ibv_\w+ failed|unhandled system error|No route to host"), "network"),
)  # fmt: skip
# What a rank prints when another one has gone: true, and never the cause.
_FOLLOW_UP = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|Connection refused|[Rr]emote (?:worker|process)"
    r"|ncclRemoteError|NCCL communicator was aborted|recvValue failed|failed to (?:recv|send)|TCPStore"
    r"|DistNetworkError|DistStoreError|(?:Socket|Read) (?:error|closed)|torch_distributed: .* aborted"
)
_DATA_FRAME = re.compile(r"/janusvln/data/|datasets?/.*dataset\.py")
_SAMPLE_PATH = re.compile(r"(?<![\w.])(/[^\n:*?\"'<>|]+\.\w{1,5})(?=[:'\" ,)]|$)")
_WORKER = re.compile(r"Unexpected bus error encountered in worker")
_CANNOT_START = re.compile(
    r"ModuleNotFoundError|ImportError|command not found|No module named|Permission denied|No such file or directory"
)
_OF_FILES = frozenset({"disk_full", "read_only", "file_system"})
# Slurm's ExitCode 0:53 as a shell has it, and the reason of a job that slurmd could not start. Source: slurm_errno.h.
_NO_OUTPUT_FILE = 128 + 53
_LAUNCH_FAILURE = re.compile(r"JobLaunchFailure|launch failed requeued held")


def classify(evidence: Evidence) -> FailureRecord | None:
    """The failure that the evidence proves, `unknown` where it proves none; None for an attempt that went well."""
    if evidence.state == "COMPLETED":
        return None
    return (
        _by_slurm(evidence)
        or _by_hang(evidence)
        or _by_attempt(evidence)
        or _by_cancellation(evidence)
        or _by_ranks(evidence)
        or _by_script(evidence)
        or _by_reason(evidence)
        or FailureRecord(kind="unknown", message=evidence.reason)
    )


def kind_of_message(text: str) -> FailureKind | None:
    """The class of an error's message; None for one that fits no pattern."""
    return next((kind for pattern, kind in _PATTERNS if pattern.search(text)), None)


def kind_of_error(error: RankError) -> FailureKind | None:
    """The class that the rank recorded with its error, else that of its message; None where neither has one."""
    return error.kind or kind_of_message(error.message)


def is_follow_up(message: str) -> bool:
    """Whether the message only reports that another rank is gone."""
    return _FOLLOW_UP.search(message) is not None and kind_of_message(message) in (None, "network")


def _by_slurm(evidence: Evidence) -> FailureRecord | None:
    batch = dict(evidence.logs).get("batch", "")
    kind = SLURM_STATES.get(evidence.state)
    line = None
    for pattern, named in _SLURM_PATTERNS:
        if (found := pattern.search(batch)) and kind in (None, named):
            kind, line = named, _line_at(batch, found.start())
            break
    if kind is None or (kind == "host_out_of_memory" and evidence.state == "COMPLETED"):
        return None
    node = _lost_node(batch, evidence.nodes) if kind == "node_lost" else None
    return FailureRecord(kind=kind, node=node, message=line or evidence.reason)


def _lost_node(batch: str, nodes: tuple[str, ...]) -> str | None:
    names = [name for found in _LOST_NODE.findall(batch) for name in found if name]
    return next((name.rstrip(".,:") for name in names if name.rstrip(".,:") in nodes), None)


def _by_hang(evidence: Evidence) -> FailureRecord | None:
    """A hang that the attempt found while it lasted; errors of the ranks after that are due to being ended."""
    hang = evidence.hang
    if hang is None:
        return None
    return FailureRecord(kind="hang", rank=hang.rank, node=hang.node or None, message=hang.message, frames=hang.frames)


def _by_attempt(evidence: Evidence) -> FailureRecord | None:
    """The attempt's own error has a class; where it could not be stored, the exit code identifies those of the gate."""
    if evidence.kind is not None:
        return FailureRecord(kind=evidence.kind, message=evidence.reason)
    if evidence.exit_code == 10:
        return FailureRecord(kind="preflight", message=evidence.reason)
    if evidence.exit_code == 11:
        return FailureRecord(kind="preflight_undetermined", message=evidence.reason)
    return None


def _by_cancellation(evidence: Evidence) -> FailureRecord | None:
    if evidence.state not in ("CANCELLED", "STOPPED"):
        return None
    return FailureRecord(kind="cancelled", message=evidence.reason)


def _by_ranks(evidence: Evidence) -> FailureRecord | None:
    errors = sorted(evidence.errors, key=lambda e: e.time)
    own = [e for e in errors if not (e.is_follow_up or (e.kind is None and is_follow_up(e.message)))]
    causes = [e for e in own if kind_of_error(e) not in ("nccl_timeout", "network")]
    if causes:
        return _of_error(causes[0], evidence)
    if (died := _first_killed(evidence.exits)) is not None:
        return _of_exit(died, evidence)
    if (killed := find_killed_agent(evidence)) is not None:
        return killed
    if (logged := _by_logs(evidence)) is not None:
        return logged
    if own:
        return _of_hang(own[0], evidence)
    if errors:
        return _of_pair(errors, evidence) or _of_missing(errors[0], evidence)
    return None


def _of_error(error: RankError, evidence: Evidence) -> FailureRecord:
    kind = kind_of_error(error)
    if kind is None and any(_DATA_FRAME.search(frame) for frame in error.frames):
        kind = "bad_data"
    path = next(iter(_SAMPLE_PATH.findall(error.message)), None) if kind == "bad_data" else None
    message = error.message
    if kind == "disk_full" and any("/multiprocessing/" in frame for frame in error.frames):
        # A semaphore of the loader's could not be made: /dev/shm is full, not the disk.
        kind = "loader"
    if kind == "loader" and (line := _line_of_worker(error, evidence)):
        message = line
    # CUDA's message is often no more than "unspecified launch failure"; the log of that rank may name the Xid.
    if kind is None and "CUDA error" in error.message and (xid := _xid_line(evidence, error.node)):
        return FailureRecord(kind="xid", rank=error.rank, node=error.node, message=xid, frames=error.frames)
    return FailureRecord(
        kind=kind or "exception",
        rank=error.rank,
        node=error.node,
        message=message,
        frames=error.frames,
        path=path,
        hint=error.hint or advice_for(message, error.node),
        error_type=error.type,
    )


def _line_of_worker(error: RankError, evidence: Evidence) -> str | None:
    """The loader worker's own last line, from the rank's log or the end of a traceback that the rank passed on."""
    log = dict(evidence.logs).get(f"{error.node}:{error.rank}", "").split("\n")
    logged = [line.strip() for line in log if _WORKER.search(line)]
    passed_on = [line.strip() for line in error.message.split("\n")[1:] if kind_of_message(line.strip()) == "loader"]
    return next(reversed(logged + passed_on), None)


def _first_killed(exits: Iterable[RankExit]) -> RankExit | None:
    """The rank that a signal ended; not one that torchrun itself ended afterwards."""
    killed = [e for e in exits if e.code < 0 and not e.was_closed and e.code != -SIGTERM]
    return killed[0] if killed else None


def _of_exit(died: RankExit, evidence: Evidence) -> FailureRecord:
    name, logs = _signal_name(-died.code), dict(evidence.logs)
    text = logs.get(f"{died.node}:{died.rank}", "")
    # Until a rank has a log of its own, it writes into the node's.
    found = _last_classified(text) if text else _last_of_node(logs.get(died.node, ""))
    if found is not None:
        return FailureRecord(kind=found[0], rank=died.rank, node=died.node, message=found[1])
    message = f"{name} ended the process of rank {died.rank}"
    if died.code == -Signals.SIGKILL and (line := oom_line(logs.get(died.node, ""))):
        return FailureRecord(kind="host_out_of_memory", rank=died.rank, node=died.node, message=f"{message}; {line}")
    return FailureRecord(
        kind="signal", rank=died.rank, node=died.node, message=message, hint=advise_on_signal(name, died.node)
    )


def _by_logs(evidence: Evidence) -> FailureRecord | None:
    """The class that a log shows, where no error file or signal gives one: the ranks' logs first, then the nodes'."""
    for place, text in evidence.logs:
        if place == "batch":
            continue
        node, _, rank = place.partition(":")
        found = _last_classified(text) if rank else (("xid", line) if (line := _xid_line(evidence, node)) else None)
        if found is not None and found[0] not in ("nccl_timeout", "network"):
            return FailureRecord(kind=found[0], rank=int(rank) if rank else None, node=node, message=found[1])
    for place, text in evidence.logs:
        found = None if place == "batch" or ":" in place else _last_of_node(text)
        if found is not None and found[0] not in ("nccl_timeout", "network"):
            return FailureRecord(kind=found[0], node=place, message=found[1])
    return None


def _last_of_node(text: str) -> tuple[FailureKind, str] | None:
    """The last line of a class in a node's log: torchrun's own, or a rank's that had no log yet."""
    return _last_classified(_before_table(text))


def _before_table(text: str) -> str:
    """A node's log without torchrun's table of exit codes, which has several lines for each rank."""
    at = text.rfind("ChildFailedError")
    return text[:at] if at >= 0 else text


def _last_classified(text: str) -> tuple[FailureKind, str] | None:
    """The last classified line among the last 60 of a log."""
    for line in reversed(text.rstrip().split("\n")[-60:]):
        if (kind := kind_of_message(line)) is not None and kind != "hang":
            return kind, line.strip()
    return None


def _of_hang(noticed: RankError, evidence: Evidence) -> FailureRecord:
    """Ranks that waited until the time-out did not hang themselves: the hung ones printed nothing."""
    kind = kind_of_error(noticed) or "nccl_timeout"
    silent = _silent_ranks(evidence)
    if kind == "nccl_timeout" and (stall := evidence.stall) is not None and stall.missing:
        rank = stall.missing[0] if len(stall.missing) == 1 else None
        message = f"{stall.message}\n{noticed.message}"
        node = dict(evidence.ranks).get(rank) if rank is not None else None
        return FailureRecord(kind=kind, rank=rank, node=node, message=message, frames=stall.frames or noticed.frames)
    if len(silent) == 1 and kind == "nccl_timeout":
        rank, node = silent[0]
        waited = f"rank {rank} did not take part; rank {noticed.rank} on {noticed.node}: {noticed.message}"
        return FailureRecord(kind=kind, rank=rank, node=node, message=waited, frames=noticed.frames)
    return FailureRecord(
        kind=kind,
        rank=noticed.rank,
        node=noticed.node,
        message=noticed.message,
        frames=noticed.frames,
        hint=noticed.hint or advice_for(noticed.message, noticed.node),
    )


def _of_pair(errors: Sequence[RankError], evidence: Evidence) -> FailureRecord | None:
    """The network between ranks that all live and report; where a rank is silent, its end explains the same errors."""
    known = [e for e in errors if (found := find_known(e.message)) and found.of_pair]
    return None if not known or _silent_ranks(evidence) else _of_hang(known[0], evidence)


def _of_missing(noticed: RankError, evidence: Evidence) -> FailureRecord:
    """Every rank with an error only lost another one: the first to fail is among those without an error."""
    silent = _silent_ranks(evidence)
    if len(silent) == 1:
        rank, node = silent[0]
        message = f"rank {rank} ended without a message; rank {noticed.rank} on {noticed.node}: {noticed.message}"
        return FailureRecord(kind="unknown", rank=rank, node=node, message=message)
    lost = sorted({node for _, node in silent})
    return FailureRecord(
        kind="unknown", node=lost[0] if len(lost) == 1 else None, message=noticed.message, frames=noticed.frames
    )


def _silent_ranks(evidence: Evidence) -> list[tuple[int, str]]:
    with_error = {e.rank for e in evidence.errors}
    return [(rank, node) for rank, node in evidence.ranks if rank not in with_error]


def _by_script(evidence: Evidence) -> FailureRecord | None:
    """The batch script ended before the attempt or its ranks could begin."""
    if evidence.script is not None:
        message = evidence.script.message
        return FailureRecord(
            kind="environment", node=evidence.script.node, message=message, hint=advise_on_setup(message)
        )
    if evidence.ranks:
        return None
    for place, text in evidence.logs:
        if (found := _last_classified(_before_table(text))) is not None and found[0] in _OF_FILES:
            return FailureRecord(kind=found[0], node=None if place == "batch" else place, message=found[1])
    for place, text in evidence.logs:
        lines = [line for line in _before_table(text).split("\n")[-40:] if _CANNOT_START.search(line)]
        if lines:
            node = None if place == "batch" else place.partition(":")[0]
            return FailureRecord(kind="environment", node=node, message=lines[-1].strip())
    return None


def _by_reason(evidence: Evidence) -> FailureRecord | None:
    """The reason that the attempt recorded, and the signal behind an exit code above 128."""
    if not evidence.ranks and (evidence.exit_code == _NO_OUTPUT_FILE or _LAUNCH_FAILURE.search(evidence.reason or "")):
        return FailureRecord(
            kind="environment",
            node=evidence.nodes[0] if evidence.nodes else None,
            message="slurmd could not open the job's output file logs/batch.log: the node does not see the run folder, "
            "or may not write to it",
            hint="submit it again with a runs_dir that the nodes see, --set runs_dir=/…; "
            "touch in the run's logs/ on that node shows the reason",
        )
    if evidence.reason and (kind := kind_of_message(evidence.reason)) is not None:
        return FailureRecord(kind=kind, message=evidence.reason)
    if evidence.exit_code is not None and 128 < evidence.exit_code <= 192:
        name = _signal_name(evidence.exit_code - 128)
        return FailureRecord(kind="signal", message=f"{name} ended the job (exit code {evidence.exit_code})")
    return None


def _xid_line(evidence: Evidence, node: str) -> str | None:
    for place, text in evidence.logs:
        if place.partition(":")[0] == node:
            lines = [line.strip() for line in text.split("\n") if kind_of_message(line) == "xid"]
            if lines:
                return lines[-1]
    return None


def _line_at(text: str, at: int) -> str:
    start = text.rfind("\n", 0, at) + 1
    end = text.find("\n", at)
    return text[start : end if end >= 0 else len(text)].strip()


def _signal_name(number: int) -> str:
    try:
        return Signals(number).name
    except ValueError:
        return f"signal {number}"
