"""Paths as the job means them: there, readable, of the right kind, and room where the run writes."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from janus_cluster.config.schema import ResolvedJob
from janus_cluster.preflight.model import CheckResult


def wanted_paths(resolved: ResolvedJob) -> dict[str, str]:
    """Check id → path, for everything that the job reads."""
    job = resolved.job
    wanted: dict[str, str] = {}
    if job.model.path:
        wanted["paths.model"] = job.model.path
    if job.model.vggt_path:
        wanted["paths.vggt"] = job.model.vggt_path
    for i, root in enumerate(job.data.roots):
        wanted["paths.data" if i == 0 else f"paths.data.{i}"] = root.path
    for i, path in enumerate(job.preflight.require_paths):
        wanted["paths.required" if i == 0 else f"paths.required.{i}"] = path
    return wanted


def read_paths(wanted: dict[str, str], run_dir: Path) -> dict[str, Any]:
    """Facts: for each path whether it is there and readable; free bytes and writability of the run folder."""
    return {
        "paths": {check_id: _read_path(path) for check_id, path in wanted.items()},
        "run_dir": {
            "path": str(run_dir),
            "writable": os.access(run_dir, os.W_OK),
            "free_bytes": shutil.disk_usage(run_dir).free,
        },
    }


def _read_path(path: str) -> dict[str, Any]:
    try:
        kind = "folder" if stat.S_ISDIR(Path(path).stat().st_mode) else "file"
        readable = os.access(path, os.R_OK | (os.X_OK if kind == "folder" else 0))
        empty = kind == "folder" and readable and _is_empty(path)
    except OSError as e:
        return {"path": path, "error": e.strerror or str(e)}
    return {"path": path, "kind": kind, "readable": readable, "empty": empty}


def _is_empty(folder: str) -> bool:
    with os.scandir(folder) as entries:
        return next(entries, None) is None


def judge_paths(facts: dict[str, Any], *, node: str, min_free_gb: float) -> list[CheckResult]:
    """FAIL for a path that is missing, unreadable or empty, and for a run folder without room.

    Units: min_free_gb in GB of 1e9 bytes.
    """
    results = [_judge_path(check_id, fact, node) for check_id, fact in facts["paths"].items()]
    run = facts["run_dir"]
    free_gb = run["free_bytes"] / 1e9
    is_sound = run["writable"] and free_gb >= min_free_gb
    results.append(
        CheckResult(
            id="paths.run_dir",
            phase="static",
            node=node,
            state="PASS" if is_sound else "FAIL",
            measured=f"{free_gb:.1f} GB free" if run["writable"] else "not writable",
            expected=f">= {min_free_gb:g} GB free, writable",
            unit="GB",
            threshold_source="preflight.min_free_gb",
            fix="" if is_sound else f"make room or set runs_dir to another file system: {run['path']}",
        )
    )
    return results


def _judge_path(check_id: str, fact: dict[str, Any], node: str) -> CheckResult:
    problems: Sequence[tuple[bool, str]] = (
        ("error" in fact, str(fact.get("error", ""))),
        (not fact.get("readable", True), "not readable"),
        (bool(fact.get("empty")), "an empty folder"),
    )
    found = [text for is_so, text in problems if is_so]
    return CheckResult(
        id=check_id,
        phase="static",
        node=node,
        state="FAIL" if found else "PASS",
        measured=f"{fact['path']}: {found[0]}" if found else f"{fact['path']}: {fact['kind']}",
        expected="exists, readable, not empty, on every node",
        threshold_source="job file",
        fix=f"on {node}: ls -ld {fact['path']}; is the file system mounted there?" if found else "",
    )
