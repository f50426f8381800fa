"""The health of each GPU: ECC, remapped rows, throttling, PCIe width, persistence, fabric. Pure judges over tables."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from janus_cluster.preflight.gpu import parse_number
from janus_cluster.preflight.model import Check, CheckResult, State, worst

# Bits of clocks_event_reasons.active. Source: NVML API reference, nvmlClocksEventReasons.
BAD_REASONS = {0x8: "HW slowdown", 0x20: "SW thermal slowdown", 0x40: "HW thermal slowdown", 0x80: "HW power brake"}
BENIGN_REASONS = {0x1: "idle", 0x4: "SW power cap"}
OTHER_REASONS = {0x2: "application clocks setting", 0x10: "sync boost", 0x100: "display clock setting"}

Row = dict[str, str]
Opinion = tuple[State, str]
# Table, check id, what is expected, the opinion on one row, how to mend it.
Family = tuple[str, str, str, Callable[[Row], Opinion], str]
_SHOWN = 3


def judge_gpu_health(
    tables: dict[str, Any], profile: dict[str, Any], *, node: str, gpus_per_node: int
) -> list[CheckResult]:
    """One result a family; nothing where no GPU is wanted, or nvidia-smi said nothing at all (gpu.count tells)."""
    if not profile["wanted"] or tables["identity"]["error"] is not None:
        return []
    known = {row.get(key, "") for row in tables["identity"]["rows"] for key in ("index", "uuid")}
    return [
        judge_rows(
            tables[family],
            opinion,
            Check(id=check_id, node=node, expected=expected, source=profile["source"]),
            known=known,
            gpus_per_node=gpus_per_node,
            fix=f"on {node}: {fix}",
        )
        for family, check_id, expected, opinion, fix in _families(int(profile["pcie_width_min"]))
    ]


def _families(width: int) -> tuple[Family, ...]:
    return (
        ("ecc", "gpu.ecc", "no uncorrected error", judge_ecc, "nvidia-smi -q -d ECC; reset or replace the GPU"),
        (
            "remapped",
            "gpu.remapped_rows",
            "none pending, none failed, none uncorrectable",
            judge_remapped,
            "nvidia-smi -q -d ROW_REMAPPER; pending: reset the GPU; failed: replace it",
        ),
        (
            "throttle",
            "gpu.throttle",
            "none of 0x8 0x20 0x40 0x80",
            judge_throttle,
            "nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER; look at fans, inlet temperature and power supplies",
        ),
        (
            "pcie",
            "gpu.pcie_width",
            f"x{width}",
            lambda row: judge_pcie(row, width),
            "nvidia-smi -q | grep -A8 'Link Width'; reseat the GPU board",
        ),
        (
            "persistence",
            "gpu.persistence",
            "Enabled",
            judge_persistence,
            "as root: systemctl enable --now nvidia-persistenced",
        ),
        (
            "fabric",
            "gpu.fabric",
            "Completed, Success",
            judge_fabric,
            "nvidia-smi -q | grep -A3 Fabric; systemctl status nvidia-fabricmanager",
        ),
    )


def judge_rows(
    table: dict[str, Any],
    opinion: Callable[[Row], Opinion],
    check: Check,
    *,
    known: Collection[str],
    gpus_per_node: int,
    fix: str,
) -> CheckResult:
    """The worst row wins; a row that is missing, damaged, of no `known` GPU or told by a failing program is no pass."""
    told: list[str] = []
    states: list[State] = []
    for row in table["rows"]:
        key = row.get("index") or row.get("gpu_uuid", "?")
        state, text = opinion(row) if key in known else ("ERROR", "is none of this node's GPUs")
        states.append(state)
        if state != "PASS":
            told.append(f"GPU {key}: {text}")
    if table["error"] or table["problem"]:
        states.append("ERROR")
        told.append(table["error"] or table["problem"])
    elif len(table["rows"]) != gpus_per_node or table["damaged"]:
        states.append("ERROR")
        told.append(f"{len(table['rows'])} of {gpus_per_node} GPUs answered")
        told += table["damaged"][:_SHOWN]
    more = [f"and {len(told) - _SHOWN} more"] if len(told) > _SHOWN + 1 else []
    shown = told[:_SHOWN] if more else told
    return check.judged(worst(states), "; ".join([*shown, *more]) or f"{len(table['rows'])} GPUs", fix=fix)


def judge_ecc(row: Row) -> Opinion:
    """An uncorrected error since the driver was loaded is a fault; a counter that is not told is not zero.

    The aggregate is never set back: an old error, whose row `remapped_rows` judges, is worth knowing.
    """
    counts = {
        kind: parse_number(row.get(f"ecc.errors.uncorrected.{kind}.total", "")) for kind in ("volatile", "aggregate")
    }
    bad = [f"{int(n)} uncorrected ({kind})" for kind, n in counts.items() if n]
    if bad:
        return ("FAIL" if counts["volatile"] else "WARN"), ", ".join(bad)
    unknown = [kind for kind, n in counts.items() if n is None]
    return ("ERROR", f"uncorrected {', '.join(unknown)}: not told") if unknown else ("PASS", "0")


def judge_remapped(row: Row) -> Opinion:
    """A failed remap: a GPU to replace; a pending one: a GPU to reset; an old uncorrectable row is worth knowing."""
    values = {k: _truth(row.get(f"remapped_rows.{k}", "")) for k in ("failure", "pending", "uncorrectable")}
    for key, state in (("failure", "FAIL"), ("pending", "FAIL"), ("uncorrectable", "WARN")):
        if values[key]:
            return ("FAIL" if state == "FAIL" else "WARN"), f"{key} {row[f'remapped_rows.{key}']}"
    unknown = [k for k, v in values.items() if v is None]
    return ("ERROR", f"{', '.join(unknown)}: not told") if unknown else ("PASS", "0")


def judge_throttle(row: Row) -> Opinion:
    """Bits of the reasons that hold the clocks down just now; an unknown bit is worth a look."""
    text = row.get("clocks_event_reasons.active", row.get("clocks_throttle_reasons.active", ""))
    try:
        bits = int(text, 16) if text.lower().startswith("0x") else None
    except ValueError:
        bits = None
    if bits is None:
        return "ERROR", f"reasons not told ({text or 'empty'})"
    bad = [name for bit, name in BAD_REASONS.items() if bits & bit]
    if bad:
        return "FAIL", f"{', '.join(bad)} (0x{bits:x})"
    known = sum(BENIGN_REASONS)
    names = [name for bit, name in OTHER_REASONS.items() if bits & bit]
    return ("WARN", f"{', '.join(names) or 'unknown reason'} (0x{bits:x})") if bits & ~known else ("PASS", hex(bits))


def judge_pcie(row: Row, width: int) -> Opinion:
    """Only the width: an idle link reports generation 1 on a sound machine; gpu_load.py judges it under load."""
    current = parse_number(row.get("pcie.link.width.current", ""))
    if current is None:
        return "ERROR", "width not told"
    return ("PASS", f"x{current:g}") if current >= width else ("FAIL", f"x{current:g}")


def judge_persistence(row: Row) -> Opinion:
    """Without it the driver unloads between jobs and the first CUDA call of each takes tens of seconds."""
    mode = row.get("persistence_mode", "")
    return ("PASS", mode) if mode == "Enabled" else ("WARN", mode or "not told")


def judge_fabric(row: Row) -> Opinion:
    """NVSwitch needs the fabric manager; a driver that does not know the question is older than it."""
    state, status = row.get("fabric.state", ""), row.get("fabric.status", "")
    if (state, status) == ("Completed", "Success"):
        return "PASS", "Completed"
    if not state or state.startswith("["):
        return "WARN", f"not told ({state or 'empty'})"
    return "FAIL", f"{state}, {status}"


def _truth(text: str) -> bool | None:
    """What a counter or a Yes/No says; None for anything else."""
    if text.lower() in ("yes", "no"):
        return text.lower() == "yes"
    number = parse_number(text)
    return None if number is None else number > 0
