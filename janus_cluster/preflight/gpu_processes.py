"""Programs that already use the node's GPUs: another job's, or what a dead one left."""

from __future__ import annotations

import pwd
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from janus_cluster.preflight.model import Check
from janus_cluster.preflight.sysfs import NodeRoot, read_text
from janus_cluster.run.records.verdict import CheckResult, State, join_few, worst

Row = dict[str, str]


def with_owners(table: Mapping[str, Any], root: NodeRoot) -> dict[str, Any]:
    """The table with `user` and `command` of each process, from /proc; empty where it is in another PID namespace."""
    rows = [row | read_owner(row["pid"], root) for row in table["rows"] if "pid" in row]
    return {**table, "rows": rows}


def read_owner(pid: str, root: NodeRoot) -> dict[str, str]:
    """User and name of a process; both empty where /proc does not show it."""
    status = read_text(root.proc / pid / "status") or ""
    values = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    uid = values.get("Uid", "").split("\t", 1)[0]
    return {"user": _name_of(uid), "command": values.get("Name", "")}


def _name_of(uid: str) -> str:
    try:
        return pwd.getpwuid(int(uid)).pw_name
    except (ValueError, KeyError):
        return uid


def judge_processes(tables: Mapping[str, Any], profile: Mapping[str, Any], *, node: str) -> list[CheckResult]:
    """FAIL for every process on a GPU but the profile's monitoring programs.

    SKIP where this nvidia-smi does not list processes; nothing where it lists no GPU (gpu.count reports that).
    """
    if not tables["identity"]["rows"]:
        return []
    check = Check(
        id="gpu.processes", node=node, expected="no process but monitoring programs", source=profile["source"]
    )
    table = tables["processes"]
    if table["refused"]:
        return [check.judged("SKIP", "this nvidia-smi does not list compute processes")]
    names = {row["uuid"]: f"GPU {row['index']}" for row in tables["identity"]["rows"]}
    allowed = frozenset(profile["processes_allowed"])
    foreign = [row for row in table["rows"] if not {Path(row["process_name"]).name, row.get("command")} & allowed]
    states: list[State] = ["FAIL" if foreign else "PASS"]
    findings = [_describe(row, names) for row in foreign]
    if problem := _problem_of(table, tables["identity"]):
        states.append("ERROR")
        findings.append(problem)
    pids = " ".join(dict.fromkeys(row["pid"] for row in foreign))
    fix = (
        f"on {node}: ps -fp {pids or 'PID'}; end what a dead job left, or ask its user; a monitoring program: "
        "--set 'preflight.thresholds.gpu.processes_allowed=[…]'"
    )
    measured = join_few(findings) or f"{len(table['rows'])} processes, all of them monitoring"
    return [check.judged(worst(states), measured, fix=fix)]


def _problem_of(table: Mapping[str, Any], identity: Mapping[str, Any]) -> str | None:
    """Why the list may be incomplete; not what gpu.count has reported of the same program."""
    if table["error"]:
        return str(table["error"])
    is_reported = bool(identity["problem"]) and table["rc"] == identity.get("rc")
    damaged = [line for line in table["damaged"] if line not in identity["damaged"]]
    if table["problem"] and not is_reported:
        return str(table["problem"])
    return f"not parsed: {damaged[0]}" if damaged else None


def _describe(row: Row, names: Mapping[str, str]) -> str:
    user = f" of {row['user']}" if row.get("user") else ", user unknown,"
    memory = row["used_gpu_memory"]
    held = f"{memory} MiB" if memory.isdigit() else memory
    return f"{names.get(row['gpu_uuid'], row['gpu_uuid'])}: pid {row['pid']}{user} ({row['process_name']}) holds {held}"
