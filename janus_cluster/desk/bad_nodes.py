"""The site's record of bad nodes: nodes.json, one record per node, run and attempt that blamed it.

    {"schema_version": 1, "nodes": [{"node", "cluster", "kind", "reason", "run", "attempt", "time", "forgiven_at"}]}

A forgiven record is kept until it is old: reading the run that made it once more must not bring it back.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from janus_cluster.errors import UsageError
from janus_cluster.job.home import site_dir
from janus_cluster.run.lock import open_lock, take_lock
from janus_cluster.run.records.base import Record

FORGET_AFTER_DAYS = 7.0
# Older records are dropped, and runs that ended longer ago than this add none.
KEEP_DAYS = 90.0
DAY_S = 86400.0
_NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
_LONGEST_REASON = 300
_LOCK_LIMIT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class NodeRecord(Record):
    """One reason to keep away from a node. Units: time and forgiven_at epoch seconds."""

    SCHEMA_VERSION: ClassVar[int | None] = None

    node: str
    cluster: str
    kind: str
    reason: str
    time: float
    run: str | None = None
    attempt: int | None = None
    forgiven_at: float | None = None

    def is_live(self, *, now: float, forget_after_days: float = FORGET_AFTER_DAYS) -> bool:
        """Whether it still counts: neither forgiven nor too old."""
        return self.forgiven_at is None and now - self.time < forget_after_days * DAY_S

    @property
    def key(self) -> tuple[str, str, str | None, int | None]:
        """Records with the same key are of one event."""
        return self.cluster, self.node, self.run, self.attempt


@dataclass(frozen=True, kw_only=True)
class NodesRecord(Record):
    """nodes.json. `nodes`: an object each; a damaged one does not make the others unreadable."""

    nodes: tuple[Any, ...]


def nodes_json(folder: Path | None = None) -> Path:
    """The file, in the site folder of JANUS_HOME unless another is given."""
    return (folder or site_dir()) / "nodes.json"


def load_nodes(folder: Path | None = None) -> list[NodeRecord]:
    """Every readable record, the newest first. A missing or damaged file counts as empty."""
    try:
        return _load(folder)
    except OSError:
        return []


def _load(folder: Path | None) -> list[NodeRecord]:
    """Raises: OSError for a file that cannot be read now: written anew, it would lose its records."""
    try:
        values = NodesRecord.read(nodes_json(folder)).nodes
    except (FileNotFoundError, ValueError):
        return []
    found = [record for value in values if (record := _parse_record(value)) is not None]
    return sorted(found, key=lambda r: r.time, reverse=True)


def _load_locked(folder: Path | None) -> list[NodeRecord]:
    try:
        return _load(folder)
    except OSError as e:
        raise UsageError(
            f"cannot read the record of bad nodes, {nodes_json(folder)}: {e.strerror or e}",
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
    """Add the records; one that is known (forgiven or not) is left as it is. Returns: the new ones."""
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
    """Add a record by hand. Raises: UsageError for a name that is none, or an empty reason."""
    if not _NODE_NAME.fullmatch(node):
        raise UsageError(f"{node!r} is no node's name", hint="one name as `sinfo -N` shows it, e.g. h800-02")
    if not reason.strip():
        raise UsageError("--reason is empty; it is shown for a week", hint='--reason "fan broken, ticket 12"')
    # By hand there is no run; the time distinguishes it from an earlier one that was forgiven.
    record = NodeRecord(node=node, cluster=cluster, kind="by hand", reason=reason.strip(), time=now, run=f"{now:.6f}")
    (added,) = remember_nodes([record], now=now, folder=folder)
    return added


def forgive_nodes(nodes: Iterable[str] | None, *, now: float, folder: Path | None = None) -> list[str]:
    """Forgive every record of the nodes (None: of all nodes). Returns: the names of those that had one."""
    wanted = None if nodes is None else set(nodes)
    with _locked(folder):
        before = _load_locked(folder)
        chosen = [r.forgiven_at is None and (wanted is None or r.node in wanted) for r in before]
        after = [replace(r, forgiven_at=now) if hit else r for r, hit in zip(before, chosen, strict=True)]
        if any(chosen):
            _write(after, now=now, folder=folder)
    return sorted({r.node for r, hit in zip(before, chosen, strict=True) if hit})


def _write(records: Sequence[NodeRecord], *, now: float, folder: Path | None) -> None:
    kept = tuple(r for r in records if now - max(r.time, r.forgiven_at or 0.0) < KEEP_DAYS * DAY_S)
    NodesRecord(nodes=kept).write(nodes_json(folder), mode=0o600)


@contextlib.contextmanager
def _locked(folder: Path | None) -> Iterator[None]:
    """Lock the file inside the block. Raises: UsageError where it cannot be written."""
    path = nodes_json(folder)
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Where the file system has no locks, the write is atomic nevertheless.
            take_lock(stack.enter_context(open_lock(path.with_suffix(".lock"))), wait_s=_LOCK_LIMIT_S)
        except OSError as e:
            raise UsageError(
                f"cannot write the record of bad nodes, {path}: {e.strerror or e}",
                hint="choose another place: JANUS_HOME=/path",
            ) from e
        yield


def _parse_record(value: Any) -> NodeRecord | None:
    try:
        record = NodeRecord.from_json(value)
    except ValueError:
        return None
    return record if _NODE_NAME.fullmatch(record.node) else None
