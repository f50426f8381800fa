"""The job's paths: present, readable, with the right kind of content; free space where the run writes."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from janus_cluster.job.schema import JobConfig
from janus_cluster.preflight.data_scan import scan_data
from janus_cluster.preflight.model import Check
from janus_cluster.preflight.model_files import scan_model, scan_vggt
from janus_cluster.preflight.path_view import read_speed_gb_per_s, read_view
from janus_cluster.preflight.room import checkpoint_room_bytes
from janus_cluster.run.records.verdict import CheckResult, State

# Together under the 5 s that the static phase of a node may take.
_SCAN_S = 2.5
_VIEW_S = 1.0
_PROBE_BYTES = 1_000_000
_MIN_INODES = 10_000


def wanted_paths(job: JobConfig) -> dict[str, str]:
    """Check id → path, for everything that the job reads."""
    wanted: dict[str, str] = {}
    if job.model.path:
        wanted["paths.model"] = job.model.path
    if job.model.vggt_path:
        wanted["paths.vggt"] = job.model.vggt_path
    for i, root in enumerate(job.data.roots):
        wanted["paths.data" if i == 0 else f"paths.data.{i}"] = root.path
        if root.images:
            wanted["paths.images" if i == 0 else f"paths.images.{i}"] = root.images
    for i, path in enumerate(job.preflight.require_paths):
        wanted["paths.required" if i == 0 else f"paths.required.{i}"] = path
    return wanted


def read_paths(job: JobConfig, run_dir: Path) -> dict[str, Any]:
    """Facts of every path that the job reads, and of the run folder that it writes to."""
    return {
        "paths": {check_id: _read_path(check_id, path, job) for check_id, path in wanted_paths(job).items()},
        "output": read_output(run_dir),
        # Here, where model.path is readable: the verdict is made on node 0 from the nodes' facts.
        "room_bytes": checkpoint_room_bytes(job),
    }


def _read_path(check_id: str, path: str, job: JobConfig) -> dict[str, Any]:
    try:
        kind = "folder" if stat.S_ISDIR(Path(path).stat().st_mode) else "file"
        fact: dict[str, Any] = {"path": path, "kind": kind}
        fact["readable"] = os.access(path, os.R_OK | (os.X_OK if kind == "folder" else 0))
        fact["empty"] = fact["readable"] and _is_empty(Path(path), kind)
        if not fact["readable"] or fact["empty"]:
            return fact
        family = check_id.split(".")[1]
        if family == "model":
            fact["content"] = scan_model(job.model)
        elif family == "vggt":
            fact["content"] = scan_vggt(job.model)
        elif family == "data":
            fact["data"] = scan_data(Path(path), budget_s=_SCAN_S)
        fact["view"] = read_view(Path(path), budget_s=_VIEW_S)
        if family == "data":
            fact["view"]["names"] = fact["data"]["names"]
        if family in ("model", "vggt"):
            fact["read_gb_per_s"] = read_speed_gb_per_s(Path(path))
    except OSError as e:
        return {
            "path": path,
            "error": f"{e.strerror or e}" + (f" ({e.filename})" if e.filename not in (None, path) else ""),
        }
    return fact


def _is_empty(path: Path, kind: str) -> bool:
    if kind == "file":
        return path.stat().st_size == 0
    with os.scandir(path) as entries:
        return next(entries, None) is None


def read_output(run_dir: Path) -> dict[str, Any]:
    """Free bytes and inodes where the run writes, and whether a file of 1 MB could be written there and removed.

    Tried, not looked up: permission bits show writable on a read-only mount, to root, and over a quota.
    """
    fact: dict[str, Any] = {"path": str(run_dir), "error": None, "free_bytes": None, "free_inodes": None}
    try:
        stat = os.statvfs(run_dir)
        fact |= {"free_bytes": stat.f_bavail * stat.f_frsize, "free_inodes": stat.f_favail if stat.f_files else None}
        with tempfile.TemporaryFile(dir=run_dir) as probe:
            probe.write(b"\0" * _PROBE_BYTES)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as e:
        fact["error"] = "no space left" if e.errno == errno.ENOSPC else e.strerror or str(e)
    return fact


def judge_paths(facts: dict[str, Any], job: JobConfig, *, node: str) -> list[CheckResult]:
    """Every path, then free space and inodes where the run writes."""
    results = [_judge_path(check_id, fact, node) for check_id, fact in facts["paths"].items()]
    min_free_gb, room_bytes = job.preflight.min_free_gb, facts["room_bytes"]
    return [*results, *judge_output(facts["output"], node=node, min_free_gb=min_free_gb, room_bytes=room_bytes)]


def judge_output(fact: dict[str, Any], *, node: str, min_free_gb: float, room_bytes: int) -> list[CheckResult]:
    """FAIL where nothing can be written, or less is free than the run will keep.

    Units: min_free_gb in GB of 1e9 bytes.
    """
    wanted_gb = max(min_free_gb, room_bytes / 1e9)
    source = (
        "preflight.min_free_gb" if min_free_gb * 1e9 >= room_bytes else "parameters × bytes × checkpoints kept + export"
    )
    check = Check(
        id="paths.output", node=node, expected=f"writable, >= {wanted_gb:.3g} GB free", source=source, unit="GB"
    )
    fix = f"on {node}: df -h {fact['path']}; make room, or set runs_dir to another file system"
    if fact["error"]:
        free = f", {fact['free_bytes'] / 1e9:.3g} GB free" if fact["free_bytes"] is not None else ""
        return [check.judged("FAIL", f"{fact['path']}: {fact['error']}{free}", fix=fix)]
    free_gb = fact["free_bytes"] / 1e9
    inodes = Check(id="paths.inodes", node=node, expected=f">= {_MIN_INODES} free", source="static", unit="inodes")
    count, inode_fix = fact["free_inodes"], f"on {node}: df -i {fact['path']}"
    # The exact number differs from node to node and moment to moment; it is shown only where there are too few.
    is_enough = count is not None and count >= _MIN_INODES
    counted = (
        inodes.judged("SKIP", "this file system does not count inodes")
        if count is None
        else inodes.judged("PASS" if is_enough else "FAIL", "enough" if is_enough else str(count), fix=inode_fix)
    )
    return [check.judged("PASS" if free_gb >= wanted_gb else "FAIL", f"{free_gb:.1f} GB free", fix=fix), counted]


def _judge_path(check_id: str, fact: Mapping[str, Any], node: str) -> CheckResult:
    expected = "exists, readable, right content, on every node"
    check = Check(id=check_id, node=node, expected=expected, source="job file")
    path = fact["path"]
    if "error" in fact:
        fix = f"on {node}: ls -ld {path}; is the file system mounted there?"
        return check.judged("FAIL", f"{path}: {fact['error']}", fix=fix)
    if not fact["readable"] or fact["empty"]:
        what = f"an empty {fact['kind']}" if fact["empty"] else "not readable"
        return check.judged(
            "FAIL", f"{path}: {what}", fix=f"on {node}: ls -ld {path}; is the file system mounted there?"
        )
    if "data" in fact:
        return judge_data(check, fact)
    content = fact.get("content", {"problems": [], "doubts": [], "told": fact["kind"]})
    speed = f", read {fact['read_gb_per_s']:.2g} GB/s" if fact.get("read_gb_per_s") else ""
    wrong = [*content["problems"], *content["doubts"]]
    state: State = "FAIL" if content["problems"] else "WARN" if wrong else "PASS"
    fix = f"on {node}: compare {path} with the source of the download; copy it again"
    return check.judged(state, f"{path}: {'; '.join(wrong) or content['told']}{'' if wrong else speed}", fix=fix)


def judge_data(check: Check, fact: Mapping[str, Any]) -> CheckResult:
    """FAIL where nothing can be trained on; WARN where part of it cannot be read, or the time ran out."""
    found, path = fact["data"], fact["path"]
    counts = f"{found['episodes']} episodes, {found['frames']} frames, {found['annotations']} annotations"
    fix = f"on {check.node}: ls -la {path}; see data.roots"
    sample = found["sample"]
    if sample and sample["error"]:
        return check.judged("FAIL", f"{path}: {sample['path']} cannot be decoded: {sample['error']}", fix=fix)
    if not found["annotations"] and not found["episodes"] and not found["partial"]:
        return check.judged("FAIL", f"{path}: {counts}: nothing to train on", fix=fix)
    if found["unreadable"]:
        return check.judged("WARN", f"{path}: {counts}; unreadable: {', '.join(found['unreadable'])}", fix=fix)
    more = " in the time there was, and more" if found["partial"] else ""
    size = f"; a frame of {sample['size'][0]}×{sample['size'][1]} decoded" if sample else ""
    return check.judged("PASS", f"{path}: {counts}{more}{size}")
