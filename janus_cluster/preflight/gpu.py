"""GPUs as nvidia-smi tells them: how many, which model, how much memory. Health is judged in gpu_health.py."""

from __future__ import annotations

from typing import Any

from janus_cluster.preflight.model import Check, CheckResult, State, worst

_SHOWN = 3


def judge_gpus(tables: dict[str, Any], profile: dict[str, Any], *, node: str, gpus_per_node: int) -> list[CheckResult]:
    """PASS only for exactly the wanted number of the wanted model with its memory; SKIP where none is wanted."""
    if not profile["wanted"]:
        check = Check(id="gpu", node=node, expected="none", source=profile["source"])
        return [check.judged("SKIP", "this profile wants no GPU")]
    table = tables["identity"]
    numbers = [str(i) for i in range(gpus_per_node)]
    gpus = [row for row in table["rows"] if row.get("index") in numbers]
    count = _judge_count(table, gpus, profile, node, gpus_per_node)
    if table["error"] is not None:
        return [count]
    return [count, _judge_model(gpus, profile, node), _judge_memory(gpus, profile, node)]


def _judge_count(
    table: dict[str, Any], gpus: list[dict[str, str]], profile: dict[str, Any], node: str, gpus_per_node: int
) -> CheckResult:
    """Anything in the answer that is no GPU counts against it: that is how a lost one shows."""
    expected = f"{gpus_per_node} × {profile['name']}"
    check = Check(id="gpu.count", node=node, expected=expected, source=profile["source"], unit="GPUs")
    if table["error"] is not None:
        fix = f"on {node}: timeout 20 nvidia-smi -L; a hang or a missing driver is for the administrator"
        return check.judged("ERROR", table["error"], fix=fix)
    odd = [*table["damaged"], *(", ".join(row.values()) for row in table["rows"] if row not in gpus)]
    states: list[State] = ["PASS" if len(gpus) == gpus_per_node and not odd else "FAIL"]
    told = [f"{len(gpus)} of {gpus_per_node} GPUs", *odd[:_SHOWN]]
    if table["problem"]:
        told.append(table["problem"])
        states.append("ERROR")
    fix = f"on {node}: nvidia-smi -L; drain the node, reset or replace the lost GPU"
    return check.judged(worst(states), "; ".join(told), fix=fix)


def _judge_model(gpus: list[dict[str, str]], profile: dict[str, Any], node: str) -> CheckResult:
    check = Check(id="gpu.model", node=node, expected=str(profile["name"]), source=profile["source"])
    names = sorted({g.get("name", "?") for g in gpus})
    others = [f"GPU {g['index']} {g.get('name', '?')}" for g in gpus if g.get("name") != profile["name"]]
    measured = (" / ".join(names) or "no GPU reported") + (f": {', '.join(others[:_SHOWN])}" if len(names) > 1 else "")
    fix = f"{node} is another kind of node: leave it out of the partition, or choose its profile"
    state: State = "PASS" if names == [profile["name"]] else "FAIL" if names else "ERROR"
    return check.judged(state, measured, fix=fix)


def _judge_memory(gpus: list[dict[str, str]], profile: dict[str, Any], node: str) -> CheckResult:
    least = profile["memory_mib_min"]
    check = Check(id="gpu.memory", node=node, expected=f">= {least} MiB", source=profile["source"], unit="MiB")
    sizes = {g["index"]: parse_number(g.get("memory.total", "")) for g in gpus}
    states: list[State] = ["ERROR" if size is None else "PASS" if size >= least else "FAIL" for size in sizes.values()]
    bad = [f"GPU {i}: {'unknown' if s is None else f'{s:g} MiB'}" for i, s in sizes.items() if s is None or s < least]
    known = [size for size in sizes.values() if size is not None]
    measured = ", ".join(bad[:_SHOWN]) or (f"{min(known):g} MiB" if known else "no GPU reported")
    return check.judged(worst(states), measured, fix=f"on {node}: nvidia-smi -q -d MEMORY; MIG must be off")


def parse_number(text: str) -> float | None:
    """The number that a value begins with (`81559 MiB`); None for anything else (`[N/A]`, `[Unknown Error]`)."""
    head = text.strip().split(" ", 1)[0]
    return float(head) if head.isascii() and head.replace(".", "", 1).isdigit() else None
