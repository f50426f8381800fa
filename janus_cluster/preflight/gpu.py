"""GPUs as nvidia-smi reports them: how many, which model, how much memory. Health is judged in gpu_health.py."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from janus_cluster.preflight.model import Check
from janus_cluster.run.records.verdict import CheckResult, State, worst

_SHOWN = 3
# Messages of an nvidia-smi that lists no GPU: one cause of everything else that is then unknown.
_CAUSES: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"version mismatch", re.IGNORECASE),
        "the driver was upgraded while loaded: reboot, or as root reload the nvidia modules (rmmod nvidia_uvm "
        "nvidia_drm nvidia_modeset nvidia; modprobe nvidia); hold the driver's packages",
    ),
    (
        re.compile(r"couldn't communicate with the NVIDIA driver|driver not loaded", re.IGNORECASE),
        "the driver is not loaded: as root modprobe nvidia; dkms status (a new kernel needs the module rebuilt)",
    ),
    (
        re.compile(r"insufficient permissions", re.IGNORECASE),
        "ls -l /dev/nvidia*: this user, container or step may not open the devices",
    ),
    (
        re.compile(r"Failed to initialize NVML: Unknown Error", re.IGNORECASE),
        "the container or step lost its devices (systemctl daemon-reload does that): restart it; ls -l /dev/nvidia*",
    ),
)
_NO_DEVICES = re.compile(r"No devices were found", re.IGNORECASE)
_SLOW = "did not answer within"


def judge_gpus(tables: dict[str, Any], profile: dict[str, Any], *, node: str, gpus_per_node: int) -> list[CheckResult]:
    """PASS only for exactly the wanted number of the wanted model with its memory; SKIP where none is wanted.

    Where nvidia-smi lists no GPU, gpu.count with the cause is the only result.
    """
    if not profile["wanted"]:
        check = Check(id="gpu", node=node, expected="none", source=profile["source"])
        return [check.judged("SKIP", "this profile wants no GPU")]
    table = tables["identity"]
    check = Check(
        id="gpu.count",
        node=node,
        expected=f"{gpus_per_node} × {profile['name'] or 'the same GPU'}",
        source=profile["source"],
        unit="GPUs",
    )
    if not table["rows"]:
        return [_judge_none(table, tables.get("environ", {}), check, gpus_per_node)]
    numbers = [str(i) for i in range(gpus_per_node)]
    gpus = [row for row in table["rows"] if row.get("index") in numbers]
    count = _judge_count(table, gpus, tables.get("environ", {}), check, gpus_per_node)
    return [count, _judge_model(gpus, profile, node), _judge_memory(gpus, profile, node)]


def _judge_none(table: dict[str, Any], environ: Mapping[str, str], check: Check, gpus_per_node: int) -> CheckResult:
    """nvidia-smi lists no GPU at all: why, and what to do about it."""
    on = f"on {check.node}: "
    output = "; ".join(table["damaged"][:_SHOWN]) or "no output"
    if table["error"] is not None:
        fix = f"{on}timeout 60 nvidia-smi -L; a missing driver or a hang is for the administrator"
        if _SLOW in table["error"]:
            fix = (
                f"{on}time nvidia-smi -L. Without persistence the first answer takes half a minute: as root, systemctl "
                "enable --now nvidia-persistenced, or --set preflight.command_timeout_s=60; one that never ends is a "
                "hung driver: reboot"
            )
        return check.judged("ERROR", table["error"], fix=fix)
    if _NO_DEVICES.search(output) and _is_step_without_gpus(environ):
        return _judge_step_without_gpus(output, check, gpus_per_node)
    problem = table["problem"]
    cause = next((fix for pattern, fix in _CAUSES if pattern.search(f"{output} {problem or ''}")), None)
    fix = on + (cause or "nvidia-smi -L; lspci | grep -i nvidia; drain the node, reset or replace the lost GPUs")
    ended = f" ({problem.partition(':')[0]})" if problem else ""
    return check.judged("FAIL", f"0 of {gpus_per_node} GPUs; {output}{ended}", fix=fix)


def _is_step_without_gpus(environ: Mapping[str, str]) -> bool:
    """Inside a Slurm job of which this process was given no GPU."""
    granted = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE")
    return "SLURM_JOB_ID" in environ and not any(environ.get(name) for name in granted)


def _judge_step_without_gpus(output: str, check: Check, gpus_per_node: int) -> CheckResult:
    fix = (
        f"this Slurm step asked for no GPU: srun --gres=gpu:{gpus_per_node} …; in a job of janus-cluster, "
        f"--set slurm.gres=gpu:{gpus_per_node}"
    )
    return check.judged("ERROR", f"{output} (a step without --gres)", fix=fix, blames_node=False)


def _judge_count(
    table: dict[str, Any],
    gpus: list[dict[str, str]],
    environ: Mapping[str, str],
    check: Check,
    gpus_per_node: int,
) -> CheckResult:
    """Rows of the output that are no GPU count as faults: a lost GPU shows as one."""
    odd = [*table["damaged"], *(", ".join(row.values()) for row in table["rows"] if row not in gpus)]
    states: list[State] = ["PASS" if len(gpus) == gpus_per_node and not odd else "FAIL"]
    findings = [f"{len(gpus)} of {gpus_per_node} GPUs", *odd[:_SHOWN]]
    if table["problem"]:
        findings.append(table["problem"])
        states.append("ERROR")
    fix = f"on {check.node}: nvidia-smi -L; drain the node, reset or replace the lost GPU"
    shown = environ.get("CUDA_VISIBLE_DEVICES")
    if worst(states) == "PASS" and shown is not None and (num := count_visible(shown, gpus)) < gpus_per_node:
        # nvidia-smi lists what the variable hides from every CUDA program.
        if num == 0 and _is_step_without_gpus(environ):
            return _judge_step_without_gpus(f"CUDA_VISIBLE_DEVICES={shown}", check, gpus_per_node)
        measured = f"{num} of {gpus_per_node} GPUs are visible to CUDA: CUDA_VISIBLE_DEVICES={shown}"
        fix = f"on {check.node}: unset CUDA_VISIBLE_DEVICES; a shell's start file or a Slurm prolog sets it"
        return check.judged("FAIL", measured, fix=fix, blames_node=False)
    return check.judged(worst(states), "; ".join(findings), fix=fix)


def count_visible(shown: str, gpus: Sequence[Mapping[str, str]]) -> int:
    """How many GPUs CUDA enumerates for a CUDA_VISIBLE_DEVICES: it stops at the first entry that names none.

    An entry is an index or the beginning of a UUID. A MIG slice is no whole GPU. A doubled entry leaves nothing.
    Source: CUDA C programming guide, CUDA environment variables.
    """
    found: list[str] = []
    for entry in (text.strip() for text in shown.split(",")):
        if entry.isascii() and entry.isdigit():
            uuids = [gpu.get("uuid", "") for gpu in gpus if gpu.get("index") == str(int(entry))]
        else:
            begins = [gpu.get("uuid", "") for gpu in gpus if gpu.get("uuid", "").startswith(entry)]
            uuids = begins if entry.startswith("GPU-") and len(begins) == 1 else []
        if not uuids:
            break
        found += uuids
    return len(found) if len(set(found)) == len(found) else 0


def _judge_model(gpus: list[dict[str, str]], profile: dict[str, Any], node: str) -> CheckResult:
    """All GPUs of the profile's name, or, where it has none, of one name. A node whose GPUs all have another name is
    another kind of node: it is to blame only where the job's other nodes have the profile's.
    """
    expected = profile["name"] or "GPUs of one name"
    check = Check(id="gpu.model", node=node, expected=expected, source=profile["source"])
    names = sorted({g.get("name", "?") for g in gpus})
    wanted = profile["name"] or (names[0] if names else None)
    others = [f"GPU {g['index']} {g.get('name', '?')}" for g in gpus if g.get("name") != wanted]
    measured = (" / ".join(names) or "no GPU reported") + (f": {', '.join(others[:_SHOWN])}" if len(names) > 1 else "")
    fix = (
        f"{node} is another kind of node: leave it out of the partition; if all nodes are so, janus-cluster preflight "
        "--profile any --calibrate, or a profile of your own (docs/preflight.md)"
    )
    state: State = "PASS" if names == [wanted] else "FAIL" if names else "ERROR"
    return check.judged(state, measured, fix=fix, blames_node=len(names) > 1)


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
