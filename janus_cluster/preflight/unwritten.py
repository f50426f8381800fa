"""Reports of nodes that cannot write into the run folder: one line in batch.log, through srun."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from janus_cluster.preflight.model import Check
from janus_cluster.run.records.verdict import CheckResult

_MARK = "preflight: cannot write into the run folder: "
_MOST_BYTES = 1_000_000


@contextmanager
def os_error_in_batch_log(stream: int, folder: Path, *, node: str, attempt: int) -> Iterator[None]:
    """Re-raises an OSError of the block after one line on the file descriptor `stream` (batch.log, through srun)."""
    try:
        yield
    except OSError as e:
        report = {"node": node, "attempt": attempt, "path": str(folder), "error": e.strerror or str(e)}
        os.write(stream, f"{_MARK}{json.dumps(report)}\n".encode())
        raise


def read_unwritten(batch_log: Path, *, attempt: int) -> dict[str, dict[str, Any]]:
    """Node → {path, error}, for the nodes of this attempt that reported one; {} where there is no such log."""
    try:
        with batch_log.open("rb") as opened:
            opened.seek(max(0, batch_log.stat().st_size - _MOST_BYTES))
            text = opened.read().decode("utf-8", errors="replace")
    except OSError:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for line in text.splitlines():
        _, mark, report = line.partition(_MARK)
        try:
            value = json.loads(report) if mark else None
        except ValueError:
            continue  # cut, or mixed with another node's line
        if isinstance(value, dict) and value.get("attempt") == attempt:
            found[str(value.get("node"))] = value
    return found


def judge_unwritten(unwritten: Mapping[str, Mapping[str, Any]], *, silent: list[str]) -> list[CheckResult]:
    """FAIL of paths.output for each of the `silent` nodes that reported why it wrote nothing."""
    results = []
    for node in silent:
        if (report := unwritten.get(node)) is None:
            continue
        check = Check(id="paths.output", node=node, expected="writable on every node", source="the node's report")
        fix = f"on {node}: touch {report['path']}; how is that file system mounted there, and is it full?"
        results.append(check.judged("FAIL", f"{report['path']}: {report['error']}", fix=fix))
    return results
