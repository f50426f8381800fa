"""A node that cannot write into the run folder cannot report there. srun carries its words to batch.log."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from janus_cluster.preflight.model import Check, CheckResult

_MARK = "preflight: cannot write into the run folder: "
_MOST_BYTES = 1_000_000


@contextmanager
def told_in_batch_log(stream: int, folder: Path, *, node: str, attempt: int) -> Iterator[None]:
    """An OSError of the block is one line on the file descriptor `stream` (batch.log, through srun), and goes on."""
    try:
        yield
    except OSError as e:
        told = {"node": node, "attempt": attempt, "path": str(folder), "error": e.strerror or str(e)}
        os.write(stream, f"{_MARK}{json.dumps(told)}\n".encode())
        raise


def read_unwritten(batch_log: Path, *, attempt: int) -> dict[str, dict[str, Any]]:
    """Node → {path, error}, for the nodes of this attempt that said so; {} where there is no such log."""
    try:
        with batch_log.open("rb") as opened:
            opened.seek(max(0, batch_log.stat().st_size - _MOST_BYTES))
            text = opened.read().decode("utf-8", errors="replace")
    except OSError:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for line in text.splitlines():
        _, mark, told = line.partition(_MARK)
        try:
            value = json.loads(told) if mark else None
        except ValueError:
            continue  # cut, or mixed with another node's line
        if isinstance(value, dict) and value.get("attempt") == attempt:
            found[str(value.get("node"))] = value
    return found


def judge_unwritten(unwritten: Mapping[str, Mapping[str, Any]], *, silent: list[str]) -> list[CheckResult]:
    """FAIL of paths.output for each of the `silent` nodes that said why it wrote nothing."""
    results = []
    for node in silent:
        if (told := unwritten.get(node)) is None:
            continue
        check = Check(id="paths.output", node=node, expected="writable on every node", source="its own words")
        fix = f"on {node}: touch {told['path']}; how is that file system mounted there, and is it full?"
        results.append(check.judged("FAIL", f"{told['path']}: {told['error']}", fix=fix))
    return results
