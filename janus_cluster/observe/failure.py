"""From evidence to a verdict on a failed attempt: which class, which rank and node first, and what it said. Pure.

The order of the question is the order of trust: what Slurm did to the job; a gate or script that ended it; an error of
one rank's own; a signal; a time-out; and last the ranks that only noticed that another was gone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from signal import SIGTERM, Signals
from typing import Literal

from janus_cluster.observe.evidence import Evidence, RankError, RankExit

Kind = Literal[
    "preflight", "preflight_undetermined", "environment", "walltime", "preempted", "node_lost", "cancelled",
    "host_out_of_memory", "gpu_out_of_memory", "xid", "disk_full", "bad_data", "loader", "bad_weights", "diverged",
    "nccl_timeout", "hang",
    "network", "signal", "exception", "unknown",
]  # fmt: skip

TITLES: Mapping[str, str] = {
    "preflight": "the gate refused the nodes",
    "preflight_undetermined": "the gate could not be judged",
    "environment": "the job's environment is broken",
    "walltime": "the walltime was used up",
    "preempted": "preempted by another job",
    "node_lost": "a node was lost",
    "cancelled": "ended by a user or a signal from outside",
    "host_out_of_memory": "the node's memory ran out",
    "gpu_out_of_memory": "GPU memory ran out",
    "xid": "a GPU failed (Xid)",
    "disk_full": "the disk is full",
    "bad_data": "a sample that cannot be used",
    "loader": "a data loader's worker could not go on",
    "bad_weights": "the weights or the data give no finite loss",
    "diverged": "the loss is no number any more",
    "nccl_timeout": "a collective timed out",
    "hang": "a rank stood still",
    "network": "the network between the ranks failed",
    "signal": "a rank was killed by a signal",
    "exception": "a rank raised an error",
    "unknown": "unknown",
}

# What Slurm did, by the state of the job and by its own words in the batch log.
_SLURM_STATES: Mapping[str, Kind] = {
    "TIMEOUT": "walltime",
    "DEADLINE": "walltime",
    "PREEMPTED": "preempted",
    "NODE_FAIL": "node_lost",
    "BOOT_FAIL": "node_lost",
    "OUT_OF_MEMORY": "host_out_of_memory",
}
_SLURM_WORDS: tuple[tuple[re.Pattern[str], Kind], ...] = (
    (re.compile(r"CANCELLED AT \S+ DUE TO TIME LIMIT"), "walltime"),
    (re.compile(r"CANCELLED AT \S+ DUE TO PREEMPTION"), "preempted"),
    (re.compile(r"(?:CANCELLED AT|FAILED) \S* ?DUE TO NODE FAILURE|[Nn]ode failure on \S+|\bNODE_FAIL\b"), "node_lost"),
    (re.compile(r"[Dd]etected \d+ oom[-_ ]kill event|\boom[-_]kill\b"), "host_out_of_memory"),
)
_LOST_NODE = re.compile(r"[Nn]ode failure on (\S+)|Node (\S+) not responding|launch failed on (\S+)")

# A rank's own words. The first pattern that fits wins, so the surer ones stand first.
_WORDS: tuple[tuple[re.Pattern[str], Kind], ...] = (
    (re.compile(r"\bXid\b.{0,40}?: ?\d+|uncorrectable (?:ECC|NVLink) error|GPU has fallen off the bus"), "xid"),
    (
        re.compile(r"\bOutOfMemoryError\b|CUDA(?: error:)? out of memory|CUBLAS_STATUS_ALLOC"
                   r"|Cuda failure (?:\d+ )?'out of memory'"),
        "gpu_out_of_memory",
    ),
    (
        re.compile(r"^data loader worker: |\bDataLoader worker \(pid|unable to \w+ (?:a )?shared memory"
                   r"|AF_UNIX path too long|insufficient shared memory|Pin memory thread"),
        "loader",
    ),
    (
        re.compile(r"No space left on device|\[Errno 28\]|os error 28|Disk quota exceeded|\[Errno 122\]"
                   r"|PytorchStreamWriter failed|inline_container\.cc.*unexpected pos|file write failed"),
        "disk_full",
    ),
    (
        re.compile(r"^MemoryError\b|DefaultCPUAllocator: can't allocate memory|Cannot allocate memory|\[Errno 12\]"
                   r"|\bstd::bad_alloc\b|Unable to allocate [\d.]+ \w+ for an array"
                   r"|memory allocation of \d+ bytes failed"),
        "host_out_of_memory",
    ),
    (re.compile(r"hold values that are not finite|before any weight was changed"), "bad_weights"),
    (re.compile(r"\bloss\b[^\n]{0,60}\b(?:nan|inf|not (?:a )?(?:finite|number))\b", re.IGNORECASE), "diverged"),
    (
        re.compile(r"collective operation timeout|before timing out|Timed out waiting \d+ ?ms for (?:send|recv)"
                   r"|Wait timeout|Socket Timeout|wait timeout after \d+"),
        "nccl_timeout",
    ),
    (
        re.compile(r"no (?:step|heartbeat|progress)\b[^\n]{0,60}\b(?:in|for|since)\b|DataLoader timed out",
                   re.IGNORECASE),
        "hang",
    ),
    (re.compile(r"IBV_WC_\w+|ncclSystemError|ibv_\w+ failed|unhandled system error|No route to host"), "network"),
)  # fmt: skip
# What a rank says when another one has gone: true, and never the cause.
_FOLLOW_UP = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|Connection refused|[Rr]emote (?:worker|process)"
    r"|ncclRemoteError|NCCL communicator was aborted|recvValue failed|failed to (?:recv|send)|TCPStore"
    r"|DistNetworkError|DistStoreError|(?:Socket|Read) (?:error|closed)|torch_distributed: .* aborted"
)
_DATA_FRAME = re.compile(r"/training/data/|datasets?/.*dataset\.py")
_SAMPLE_PATH = re.compile(r"(?<![\w.])(/[^\n:*?\"'<>|]+\.\w{1,5})(?=[:'\" ,)]|$)")
_SCRIPT_SAID = re.compile(r"^(?:job\.sbatch on (?P<node>[^:\s]+): (?P<text>.+))$", re.MULTILINE)
_HINT = "hint: "
_WORKER = re.compile(r"^data loader worker: |Unexpected bus error encountered in worker")
_CANNOT_START = re.compile(
    r"ModuleNotFoundError|ImportError|command not found|No module named|Permission denied|No such file or directory"
)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What failed first. `blames_node`: the node itself is to be kept away from, whatever the job was. `hint`: what the
    rank itself gave as the remedy.
    """

    kind: Kind
    rank: int | None = None
    node: str | None = None
    message: str | None = None
    frames: tuple[str, ...] = ()
    path: str | None = None
    hint: str | None = None

    @property
    def title(self) -> str:
        return TITLES[self.kind]

    @property
    def blames_node(self) -> bool:
        return self.kind in ("xid", "node_lost") and self.node is not None


def classify(evidence: Evidence) -> Failure | None:
    """The failure that the evidence proves, `unknown` where it proves none; None for an attempt that went well."""
    if evidence.state == "COMPLETED":
        return None
    return (
        _by_slurm(evidence)
        or _by_hang(evidence)
        or _by_gate(evidence)
        or _by_cancellation(evidence)
        or _by_ranks(evidence)
        or _by_script(evidence)
        or _by_reason(evidence)
        or Failure(kind="unknown", message=evidence.reason)
    )


def kind_of_words(text: str) -> Kind | None:
    """The class of an error's own words; None for words that fit none."""
    return next((kind for pattern, kind in _WORDS if pattern.search(text)), None)


def is_follow_up(message: str) -> bool:
    """Whether it only says that another rank is gone."""
    return _FOLLOW_UP.search(message) is not None and kind_of_words(message) in (None, "network")


def _by_slurm(evidence: Evidence) -> Failure | None:
    batch = dict(evidence.logs).get("batch", "")
    kind = _SLURM_STATES.get(evidence.state)
    line = None
    for pattern, named in _SLURM_WORDS:
        if (found := pattern.search(batch)) and kind in (None, named):
            kind, line = named, _line_at(batch, found.start())
            break
    if kind is None or (kind == "host_out_of_memory" and evidence.state == "COMPLETED"):
        return None
    node = _lost_node(batch, evidence.nodes) if kind == "node_lost" else None
    return Failure(kind=kind, node=node, message=line or evidence.reason)


def _lost_node(batch: str, nodes: tuple[str, ...]) -> str | None:
    names = [name for found in _LOST_NODE.findall(batch) for name in found if name]
    return next((name.rstrip(".,:") for name in names if name.rstrip(".,:") in nodes), None)


def _by_hang(evidence: Evidence) -> Failure | None:
    """The attempt saw it while it lasted; what the ranks say afterwards comes from being ended."""
    hang = evidence.hang
    if hang is None:
        return None
    return Failure(kind="hang", rank=hang.rank, node=hang.node or None, message=hang.message)


def _by_gate(evidence: Evidence) -> Failure | None:
    if evidence.exit_code == 10:
        return Failure(kind="preflight", message=evidence.reason)
    if evidence.exit_code == 11:
        return Failure(kind="preflight_undetermined", message=evidence.reason)
    return None


def _by_cancellation(evidence: Evidence) -> Failure | None:
    if evidence.state not in ("CANCELLED", "STOPPED"):
        return None
    # An attempt that was asked to stop in time says itself what it was asked for.
    why = (evidence.reason or "").lower()
    kind: Kind = "walltime" if "walltime" in why else "preempted" if "preempt" in why else "cancelled"
    return Failure(kind=kind, message=evidence.reason)


def _by_ranks(evidence: Evidence) -> Failure | None:
    errors = sorted(evidence.errors, key=lambda e: e.time)
    own = [e for e in errors if not is_follow_up(e.message)]
    causes = [e for e in own if kind_of_words(e.message) not in ("nccl_timeout", "network")]
    if causes:
        return _of_error(causes[0], evidence)
    if (died := _first_killed(evidence.exits)) is not None:
        return _of_exit(died, evidence)
    if (spoken := _by_last_words(evidence)) is not None:
        return spoken
    if own:
        return _of_standstill(own[0], evidence)
    if errors:
        return _of_missing(errors[0], evidence)
    return None


def _of_error(error: RankError, evidence: Evidence) -> Failure:
    kind = kind_of_words(error.message)
    path = hint = None
    if kind is None and any(_DATA_FRAME.search(frame) for frame in error.frames):
        path = next(iter(_SAMPLE_PATH.findall(error.message)), None)
        kind = "bad_data"
        hint = _hint_of(error, evidence)
    message = error.message
    if kind == "disk_full" and any("/multiprocessing/" in frame for frame in error.frames):
        # A semaphore of the loader's could not be made: /dev/shm is full, not the disk.
        kind = "loader"
    if kind == "loader" and (said := _words_of_worker(error, evidence)):
        message = said
    # CUDA's own words are often no more than "unspecified launch failure"; the log of that rank may name the Xid.
    if kind is None and "CUDA error" in error.message and (xid := _xid_line(evidence, error.node)):
        return Failure(kind="xid", rank=error.rank, node=error.node, message=xid, frames=error.frames)
    return Failure(
        kind=kind or "exception",
        rank=error.rank,
        node=error.node,
        message=message,
        frames=error.frames,
        path=path,
        hint=hint,
    )


def _hint_of(error: RankError, evidence: Evidence) -> str | None:
    """What the rank's log says of what to do, behind the traceback."""
    lines = dict(evidence.logs).get(f"{error.node}:{error.rank}", "").split("\n")
    return next((line.removeprefix(_HINT) for line in reversed(lines) if line.startswith(_HINT)), None)


def _words_of_worker(error: RankError, evidence: Evidence) -> str | None:
    """The loader worker's own last line, from the rank's log or the end of a traceback that the rank passed on."""
    log = dict(evidence.logs).get(f"{error.node}:{error.rank}", "").split("\n")
    said = [line.strip() for line in log if _WORKER.search(line)]
    passed_on = [line.strip() for line in error.message.split("\n")[1:] if kind_of_words(line.strip()) == "loader"]
    return next(reversed(said + passed_on), None)


def _first_killed(exits: Iterable[RankExit]) -> RankExit | None:
    """The rank that a signal ended; not one that torchrun itself ended afterwards."""
    killed = [e for e in exits if e.code < 0 and not e.was_told and e.code != -SIGTERM]
    return killed[0] if killed else None


def _of_exit(died: RankExit, evidence: Evidence) -> Failure:
    name, logs = _signal_name(-died.code), dict(evidence.logs)
    words = logs.get(f"{died.node}:{died.rank}", "")
    # Until a rank has a log of its own, it writes into the node's.
    found = _last_words(words) if words else _node_words(logs.get(died.node, ""))
    if found is not None:
        return Failure(kind=found[0], rank=died.rank, node=died.node, message=found[1])
    return Failure(
        kind="signal", rank=died.rank, node=died.node, message=f"{name} ended the process of rank {died.rank}"
    )


def _by_last_words(evidence: Evidence) -> Failure | None:
    """A class that a log names, where no error file and no signal names it: the ranks' logs first, then the nodes'."""
    for place, text in evidence.logs:
        if place == "batch":
            continue
        node, _, rank = place.partition(":")
        found = _last_words(text) if rank else (("xid", line) if (line := _xid_line(evidence, node)) else None)
        if found is not None and found[0] not in ("nccl_timeout", "network"):
            return Failure(kind=found[0], rank=int(rank) if rank else None, node=node, message=found[1])
    for place, text in evidence.logs:
        found = None if place == "batch" or ":" in place else _node_words(text)
        if found is not None and found[0] not in ("nccl_timeout", "network"):
            return Failure(kind=found[0], node=place, message=found[1])
    return None


def _node_words(text: str) -> tuple[Kind, str] | None:
    """The last line of a class in a node's log: torchrun's own words, or a rank's that had no log yet."""
    return _last_words(_before_table(text))


def _before_table(text: str) -> str:
    """A node's log without torchrun's table of exit codes, which is has several lines for each rank."""
    at = text.rfind("ChildFailedError")
    return text[:at] if at >= 0 else text


def _last_words(text: str) -> tuple[Kind, str] | None:
    """The last line among a log's last that belongs to a class."""
    for line in reversed(text.rstrip().split("\n")[-60:]):
        if (kind := kind_of_words(line)) is not None and kind != "hang":
            return kind, line.strip()
    return None


def _of_standstill(noticed: RankError, evidence: Evidence) -> Failure:
    """Ranks that waited until the time-out are not the ones that stood still: those said nothing."""
    kind = kind_of_words(noticed.message) or "nccl_timeout"
    silent = _silent_ranks(evidence)
    if len(silent) == 1 and kind == "nccl_timeout":
        rank, node = silent[0]
        waited = f"rank {rank} did not take part; rank {noticed.rank} on {noticed.node}: {noticed.message}"
        return Failure(kind=kind, rank=rank, node=node, message=waited, frames=noticed.frames)
    return Failure(kind=kind, rank=noticed.rank, node=noticed.node, message=noticed.message, frames=noticed.frames)


def _of_missing(noticed: RankError, evidence: Evidence) -> Failure:
    """All that spoke only lost somebody: the first is among those that did not speak."""
    silent = _silent_ranks(evidence)
    if len(silent) == 1:
        rank, node = silent[0]
        said = f"rank {rank} ended without a word; rank {noticed.rank} on {noticed.node}: {noticed.message}"
        return Failure(kind="unknown", rank=rank, node=node, message=said)
    lost = sorted({node for _, node in silent})
    return Failure(
        kind="unknown", node=lost[0] if len(lost) == 1 else None, message=noticed.message, frames=noticed.frames
    )


def _silent_ranks(evidence: Evidence) -> list[tuple[int, str]]:
    spoke = {e.rank for e in evidence.errors}
    return [(rank, node) for rank, node in evidence.ranks if rank not in spoke]


def _by_script(evidence: Evidence) -> Failure | None:
    """Nothing of ours ran: the batch script ended before the attempt or its ranks could begin."""
    logs = dict(evidence.logs)
    batch = logs.get("batch", "")
    if said := list(_SCRIPT_SAID.finditer(batch)):
        return Failure(kind="environment", node=said[-1]["node"], message=said[-1]["text"].strip())
    if evidence.ranks:
        return None
    for place, text in logs.items():
        lines = [line for line in _before_table(text).split("\n")[-40:] if _CANNOT_START.search(line)]
        if lines:
            node = None if place == "batch" else place.partition(":")[0]
            return Failure(kind="environment", node=node, message=lines[-1].strip())
    return None


def _by_reason(evidence: Evidence) -> Failure | None:
    """What the attempt itself gave as its reason, and the signal behind an exit code above 128."""
    if "environment.on_code_change" in (evidence.reason or ""):
        return Failure(kind="environment", message=evidence.reason)
    if evidence.reason and (kind := kind_of_words(evidence.reason)) is not None:
        return Failure(kind=kind, message=evidence.reason)
    if evidence.exit_code is not None and 128 < evidence.exit_code <= 192:
        name = _signal_name(evidence.exit_code - 128)
        return Failure(kind="signal", message=f"{name} ended the job (exit code {evidence.exit_code})")
    return None


def _xid_line(evidence: Evidence, node: str) -> str | None:
    for place, text in evidence.logs:
        if place.partition(":")[0] == node:
            lines = [line.strip() for line in text.split("\n") if kind_of_words(line) == "xid"]
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
