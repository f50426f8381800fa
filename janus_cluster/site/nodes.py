"""What is remembered about the site's nodes: nodes.json, one record per node, run and attempt that blamed it.

    {"schema_version": 1, "nodes": [{"node", "cluster", "kind", "reason", "run", "attempt", "time", "forgiven_at"}]}

A forgiven record stays until it is old: looking once more at the run that made it must not bring it back.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from janus_cluster.config.home import site_dir
from janus_cluster.errors import UsageError
from janus_cluster.rundir import read_json, write_text_atomically

FORGET_AFTER_DAYS = 7.0
# Older records are dropped for good, and runs that ended longer ago than this teach nothing any more.
KEEP_DAYS = 90.0
DAY_S = 86400.0
_NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
_LONGEST_REASON = 300


@dataclass(frozen=True, kw_only=True)
class NodeRecord:
    """One reason to keep away from a node. Units: time and forgiven_at epoch seconds."""

    node: str
    cluster: str
    kind: str
    reason: str
    time: float
    run: str | None = None
    attempt: int | None = None
    forgiven_at: float | None = None

    def is_live(self, *, now: float, forget_after_days: float = FORGET_AFTER_DAYS) -> bool:
        """Whether it still counts: not forgiven by hand, nor by time."""
        return self.forgiven_at is None and now - self.time < forget_after_days * DAY_S

    @property
    def key(self) -> tuple[str, str, str | None, int | None]:
        """Two records with the same key are one event, seen twice."""
        return self.cluster, self.node, self.run, self.attempt


def nodes_json(folder: Path | None = None) -> Path:
    """The file, in the site folder of JANUS_HOME unless another is given."""
    return (folder or site_dir()) / "nodes.json"


def load_nodes(folder: Path | None = None) -> list[NodeRecord]:
    """Every record that can be read, the newest first. A missing or damaged file is an empty memory."""
    try:
        return _load(folder)
    except OSError:
        return []


def _load(folder: Path | None) -> list[NodeRecord]:
    """Raises: OSError for a file that is there and cannot be read now: written anew, it would lose its records."""
    try:
        values = read_json(nodes_json(folder))["nodes"]
        found = [record for value in values if (record := _parse_record(value)) is not None]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []
    return sorted(found, key=lambda r: r.time, reverse=True)


def _load_locked(folder: Path | None) -> list[NodeRecord]:
    try:
        return _load(folder)
    except OSError as e:
        raise UsageError(
            f"cannot read the memory of nodes, {nodes_json(folder)}: {e.strerror or e}",
            hint="nothing was changed; try again once it can be read",
        ) from e


def live_nodes(
    cluster: str, *, now: float, forget_after_days: float = FORGET_AFTER_DAYS, folder: Path | None = None
) -> list[NodeRecord]:
    """The newest live record of each node of `cluster` that is to be kept away from, by node name."""
    newest: dict[str, NodeRecord] = {}
    for record in load_nodes(folder):
        if record.cluster == cluster and record.is_live(now=now, forget_after_days=forget_after_days):
            newest.setdefault(record.node, record)
    return [newest[node] for node in sorted(newest)]


def remember_nodes(records: Sequence[NodeRecord], *, now: float, folder: Path | None = None) -> list[NodeRecord]:
    """The records are in the memory; one that is known (forgiven or not) is left as it is. Returns: the new ones."""
    wanted = [r for r in records if _NODE_NAME.fullmatch(r.node) and now - r.time < KEEP_DAYS * DAY_S]
    known = {r.key for r in load_nodes(folder)}
    if all(r.key in known for r in wanted):
        return []
    with _locked(folder):
        before = _load_locked(folder)
        known = {r.key for r in before}
        new = [replace(r, reason=r.reason[:_LONGEST_REASON]) for r in wanted if r.key not in known]
        _write([*before, *new], now=now, folder=folder)
    return new


def add_node(node: str, *, cluster: str, reason: str, now: float, folder: Path | None = None) -> NodeRecord:
    """The node is remembered by hand. Raises: UsageError for a name that is none, or an empty reason."""
    if not _NODE_NAME.fullmatch(node):
        raise UsageError(f"{node!r} is no node's name", hint="one name as `sinfo -N` shows it, e.g. h800-02")
    if not reason.strip():
        raise UsageError("--reason is empty: in a week nobody will know why", hint='--reason "fan broken, ticket 12"')
    # By hand there is no run; the time keeps it apart from one that was forgiven before.
    record = NodeRecord(node=node, cluster=cluster, kind="by hand", reason=reason.strip(), time=now, run=f"{now:.6f}")
    (added,) = remember_nodes([record], now=now, folder=folder)
    return added


def forgive_nodes(nodes: Iterable[str] | None, *, now: float, folder: Path | None = None) -> list[str]:
    """Nothing counts against the nodes (None: against any) any more. Returns: the names of those that were forgiven."""
    wanted = None if nodes is None else set(nodes)
    with _locked(folder):
        before = _load_locked(folder)
        chosen = [r.forgiven_at is None and (wanted is None or r.node in wanted) for r in before]
        after = [replace(r, forgiven_at=now) if hit else r for r, hit in zip(before, chosen, strict=True)]
        if any(chosen):
            _write(after, now=now, folder=folder)
    return sorted({r.node for r, hit in zip(before, chosen, strict=True) if hit})


def _write(records: Sequence[NodeRecord], *, now: float, folder: Path | None) -> None:
    import json

    kept = [asdict(r) for r in records if now - max(r.time, r.forgiven_at or 0.0) < KEEP_DAYS * DAY_S]
    text = json.dumps({"schema_version": 1, "nodes": kept}, indent=2) + "\n"
    write_text_atomically(nodes_json(folder), text, mode=0o600)


@contextlib.contextmanager
def _locked(folder: Path | None) -> Iterator[None]:
    """No other process changes the file inside the block. Raises: UsageError where it cannot be written."""
    path = nodes_json(folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as e:
        raise UsageError(
            f"cannot write the memory of nodes, {path}: {e.strerror or e}",
            hint="choose another place: JANUS_HOME=/path",
        ) from e
    try:
        # A file system without locks (some NFS) gives ENOLCK: the write is atomic all the same.
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _parse_record(value: Any) -> NodeRecord | None:
    try:
        attempt, forgiven = value.get("attempt"), value.get("forgiven_at")
        record = NodeRecord(
            node=str(value["node"]),
            cluster=str(value["cluster"]),
            kind=str(value["kind"]),
            reason=str(value["reason"]),
            time=float(value["time"]),
            run=None if value.get("run") is None else str(value["run"]),
            attempt=None if attempt is None else int(attempt),
            forgiven_at=None if forgiven is None else float(forgiven),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return record if _NODE_NAME.fullmatch(record.node) else None


def age_text(record: NodeRecord, *, now: float | None = None) -> str:
    """`3 h ago`, `2 d ago`."""
    hours = ((time.time() if now is None else now) - record.time) / 3600
    if hours < 1:
        return f"{max(0, round(hours * 60))} min ago"
    return f"{hours:.0f} h ago" if hours < 48 else f"{hours / 24:.0f} d ago"
