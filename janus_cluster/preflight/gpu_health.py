"""The health of each GPU: ECC, remapped rows, throttling, PCIe, MIG, power, recovery, … Pure judges over tables.

A GPU that needs a reset, or is in MIG mode, is reported once; checks that it leaves without a value name that cause.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from janus_cluster.job.templates import load_gpu_errors
from janus_cluster.preflight.gpu import parse_number
from janus_cluster.preflight.gpu_known import Gpus, Row, find_lost, find_mig, is_same_for_all, known_gpus
from janus_cluster.preflight.gpu_query import RC_INFOROM
from janus_cluster.preflight.model import Check
from janus_cluster.run.records.verdict import CheckResult, State, join_few, worst

# Bits of clocks_event_reasons.active. Source: NVML API reference, nvmlClocksEventReasons.
BAD_REASONS = {0x8: "HW slowdown", 0x20: "SW thermal slowdown", 0x40: "HW thermal slowdown", 0x80: "HW power brake"}
BENIGN_REASONS = {0x1: "idle", 0x4: "SW power cap"}
OTHER_REASONS = {0x2: "application clocks setting", 0x10: "sync boost", 0x100: "display clock setting"}
_LABEL = re.compile(r"^(?:state|status)\b[\s:]*", re.IGNORECASE)

Opinion = tuple[State, str]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One check over one table. `without`: the state where the driver does not know the fields."""

    table: str
    id: str
    expected: str
    judge: Callable[[Row], Opinion]
    fix: str
    without: State = "ERROR"


def judge_gpu_health(
    tables: dict[str, Any], profile: dict[str, Any], *, node: str, gpus_per_node: int
) -> list[CheckResult]:
    """One result a family; none where no GPU is expected, or nvidia-smi lists none (gpu.count reports that)."""
    if not profile["wanted"] or not tables["identity"]["rows"]:
        return []
    needing_reset = find_lost(tables)
    gpus = known_gpus(tables, gpus_per_node, excused=dict.fromkeys(needing_reset, "gpu.reset"))
    in_mig = find_mig(tables)
    results = [*_judge_lost(needing_reset, tables, node), *_judge_warnings(tables, node)]
    for family in _families(tables, profile):
        check = Check(id=family.id, node=node, expected=family.expected, source=profile["source"])
        excused = gpus
        if family.table == "remapped":
            excused = replace(gpus, excused={**dict.fromkeys(in_mig, "gpu.mig"), **gpus.excused})
        results.append(judge_rows(tables[family.table], family, check, gpus=excused))
    return results


def _judge_lost(found: Mapping[str, str], tables: Mapping[str, Any], node: str) -> list[CheckResult]:
    """One FAIL that names the GPUs; nothing where there is none."""
    if not found:
        return []
    check = Check(id="gpu.reset", node=node, expected="no GPU needs a reset", source="NVML, nvmlErrorString")
    by_index = {row["index"]: found[row["index"]] for row in tables["identity"]["rows"] if row["index"] in found}
    findings = [f"GPU {index}: {words}" for index, words in (by_index or found).items()]
    fix = f"on {node}: drain the node; as root: nvidia-smi --gpu-reset -i {','.join(by_index or found)}, or reboot"
    return [check.judged("FAIL", join_few(findings), fix=fix)]


def _judge_warnings(tables: Mapping[str, Any], node: str) -> list[CheckResult]:
    """One WARN with what nvidia-smi warns of beside its output; nothing where it warns of nothing."""
    lines = list(dict.fromkeys(line for table in tables.values() for line in table.get("warnings", [])))
    if not lines and any(table.get("rc") == RC_INFOROM for table in tables.values()):
        lines = [f"nvidia-smi ended with {RC_INFOROM}: the infoROM of a GPU is corrupted"]
    if not lines:
        return []
    check = Check(id="gpu.warnings", node=node, expected="no warning of nvidia-smi", source="nvidia-smi")
    names = {row["pci.bus_id"].lower(): f"GPU {row['index']}" for row in tables["identity"]["rows"]}
    shown = [f"{_name_gpu(line, names)}{line}" for line in lines]
    fix = f"on {node}: nvidia-smi -q | grep -i inforom; the GPU works, a corrupted infoROM is for its vendor"
    return [check.judged("WARN", join_few(shown), fix=fix)]


def _name_gpu(line: str, names: Mapping[str, str]) -> str:
    """`GPU 2: ` where the line has the GPU's PCI address, of which it prints the last four digits of the domain."""
    found = next((name for address, name in names.items() if address[4:] in line.lower()), None)
    return f"{found}: " if found else ""


def _families(tables: Mapping[str, Any], profile: Mapping[str, Any]) -> tuple[Family, ...]:
    width, generation = int(profile["pcie_width_min"]), int(profile["pcie_generation"])
    power_w = float(profile["power_limit_w_min"])
    is_of_site = is_same_for_all(tables["pcie"].get("rows", []), "pcie.link.gen.max")
    return (
        Family(
            table="ecc",
            id="gpu.ecc",
            expected="no uncorrected error, SRAM threshold not exceeded",
            judge=judge_ecc,
            fix="nvidia-smi -q -d ECC; reset or replace the GPU",
        ),
        Family(
            table="remapped",
            id="gpu.remapped_rows",
            expected="none pending, none failed, none uncorrectable",
            judge=judge_remapped,
            fix="nvidia-smi -q -d ROW_REMAPPER; pending: reset the GPU; failed: replace it",
        ),
        Family(
            table="throttle",
            id="gpu.throttle",
            expected="none of 0x8 0x20 0x40 0x80",
            judge=judge_throttle,
            fix="nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER; look at fans, inlet temperature and power supplies",
        ),
        Family(
            table="pcie",
            id="gpu.pcie_width",
            expected=f"x{width}, and a slot of generation {generation}",
            judge=lambda row: judge_slot(row, width, generation, is_of_site=is_of_site),
            fix="nvidia-smi -q | grep -A12 'GPU Link Info'; reseat the GPU board, BIOS link speed; a whole site of an "
            f"older generation: --set preflight.thresholds.gpu.pcie_generation={generation - 1}",
        ),
        Family(
            table="persistence",
            id="gpu.persistence",
            expected="Enabled",
            judge=judge_persistence,
            fix="as root: systemctl enable --now nvidia-persistenced",
        ),
        Family(
            table="fabric",
            id="gpu.fabric",
            expected="Completed, Success",
            judge=judge_fabric,
            fix="nvidia-smi -q | grep -A3 Fabric; systemctl status nvidia-fabricmanager",
            without="WARN",
        ),
        Family(
            table="mig",
            id="gpu.mig",
            expected="Disabled",
            judge=judge_mig,
            fix="as root: nvidia-smi -mig 0 (ends what runs on the GPUs), then nvidia-smi --gpu-reset",
            without="SKIP",
        ),
        Family(
            table="recovery",
            id="gpu.recovery",
            expected="gpu_recovery_action None",
            judge=judge_recovery,
            fix="nvidia-smi --query-gpu=index,gpu_recovery_action --format=csv; drain the node and do what it names, "
            "as root: nvidia-smi --gpu-reset -i <GPU>, or reboot",
            without="SKIP",
        ),
        Family(
            table="power",
            id="gpu.power",
            expected=f">= {power_w:g} W, and the board's default",
            judge=lambda row: judge_power(row, power_w),
            fix="as root: nvidia-smi -pl <default limit>; who lowered it?",
            without="SKIP",
        ),
    )


def judge_rows(table: dict[str, Any], family: Family, check: Check, *, gpus: Gpus) -> CheckResult:
    """The worst row wins. A missing or damaged row, one of no known GPU, or one of a failing program never passes.

    What gpu.count has reported of the list of GPUs is not repeated.
    """
    fix = family.fix if family.fix.startswith("as root") else f"on {check.node}: {family.fix}"
    if table.get("refused"):
        return check.judged(family.without, f"this driver does not know the fields ({table['problem']})"[:200], fix=fix)
    findings: list[str] = []
    states: list[State] = []
    excused: dict[str, list[str]] = {}
    for row in table["rows"]:
        key = row.get("index") or row.get("gpu_uuid", "?")
        if key in gpus.excused:
            excused.setdefault(gpus.excused[key], []).append(key)
        elif key in gpus.keys:
            state, text = family.judge(row)
            states.append(state)
            findings += [] if state == "PASS" else [f"GPU {key}: {text}"]
        elif gpus.is_complete:
            states.append("ERROR")
            findings.append(f"GPU {key}: is none of this node's GPUs")
    problem = table["error"] or (table["problem"] if not gpus.rc or table.get("rc") != gpus.rc else None)
    damaged = [line for line in table["damaged"] if line not in gpus.reported and not _is_of_excused(line, gpus)]
    num = sum(key in gpus.keys for row in table["rows"] for key in [row.get("index") or row.get("gpu_uuid", "?")])
    num += sum(_is_of_excused(line, gpus) for line in table["damaged"])
    if problem:
        states.append("ERROR")
        findings.append(problem)
    elif num != gpus.num or damaged:
        states.append("ERROR")
        findings.append(f"{num} of {gpus.num} GPUs answered")
        findings += damaged
    left_out = [f"GPU {', '.join(keys)}: see {cause}" for cause, keys in excused.items()]
    if not states:
        return check.judged("SKIP", "; ".join(left_out) or "no GPU answered")
    measured = join_few(findings) or "; ".join([f"{len(states)} GPUs", *left_out])
    return check.judged(worst(states), measured, fix=fix)


def _is_of_excused(line: str, gpus: Gpus) -> bool:
    """A row with fields missing, of a GPU whose fault is reported already."""
    return line.partition(", ")[0] in gpus.excused


def merge_repeated(results: Sequence[CheckResult]) -> list[CheckResult]:
    """An ERROR with the text of an earlier one is a SKIP that names it: one cause is one line."""
    first: dict[str, str] = {}
    for r in results:
        if r.state == "ERROR":
            first.setdefault(r.measured, r.id)
    return [
        replace(r, state="SKIP", measured=f"as {first[r.measured]}: {r.measured}", fix="")
        if r.state == "ERROR" and first[r.measured] != r.id
        else r
        for r in results
    ]


def judge_ecc(row: Row) -> Opinion:
    """An uncorrected error since the driver was loaded is a fault; a counter without a value is not zero.

    The aggregate is never set back: an old error, whose row `remapped_rows` judges, is a WARN.
    """
    counts = {
        kind: parse_number(row.get(f"ecc.errors.uncorrected.{kind}.total", "")) for kind in ("volatile", "aggregate")
    }
    bad = [f"{int(n)} uncorrected ({kind})" for kind, n in counts.items() if n]
    # Older drivers and parts without the threshold print [N/A], or do not know the field.
    exceeded = row.get("ecc.errors.uncorrected.aggregate.sram.thresholdExceeded", "[N/A]")
    if exceeded == "Yes":
        return "FAIL", ", ".join([*bad, "SRAM error threshold exceeded: replace the GPU"])
    if bad:
        return ("FAIL" if counts["volatile"] else "WARN"), ", ".join(bad)
    unknown = [f"uncorrected {kind}" for kind, n in counts.items() if n is None]
    if exceeded not in ("No", "[N/A]"):
        unknown.append("SRAM threshold")
    return ("ERROR", f"{', '.join(unknown)}: not reported") if unknown else ("PASS", "0")


def judge_remapped(row: Row) -> Opinion:
    """A failed remap: replace the GPU. A pending one: reset it. An old uncorrectable row: WARN."""
    values = {k: _truth(row.get(f"remapped_rows.{k}", "")) for k in ("failure", "pending", "uncorrectable")}
    for key, state in (("failure", "FAIL"), ("pending", "FAIL"), ("uncorrectable", "WARN")):
        if values[key]:
            return ("FAIL" if state == "FAIL" else "WARN"), f"{key} {row[f'remapped_rows.{key}']}"
    unknown = [k for k, v in values.items() if v is None]
    return ("ERROR", f"{', '.join(unknown)}: not reported") if unknown else ("PASS", "0")


def parse_reasons(row: Mapping[str, str]) -> int | None:
    """The bits of what holds the clocks down, under either name; None where the driver reports none."""
    text = _reasons_text(row)
    try:
        return int(text, 16) if text.lower().startswith("0x") else None
    except ValueError:
        return None


def _reasons_text(row: Mapping[str, str]) -> str:
    return row.get("clocks_event_reasons.active", row.get("clocks_throttle_reasons.active", ""))


def judge_throttle(row: Row) -> Opinion:
    """Bits of the reasons that hold the clocks down at this moment; an unknown bit is a WARN."""
    bits = parse_reasons(row)
    if bits is None:
        return "ERROR", f"reasons not reported ({_reasons_text(row) or 'empty'})"
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
        return "ERROR", "width not reported"
    return ("PASS", f"x{current:g}") if current >= width else ("FAIL", f"x{current:g}")


def judge_slot(row: Row, width: int, generation: int, *, is_of_site: bool) -> Opinion:
    """The width, and the generation that the slot allows: pcie.link.gen.max follows the host, gpumax is the GPU's own.

    is_of_site: every GPU has the same slot, so that it is the machine's kind (WARN) and not one bad slot or retimer.
    """
    state, measured = judge_pcie(row, width)
    of_slot, of_gpu = (parse_number(row.get(f"pcie.link.gen.{key}", "")) for key in ("max", "gpumax"))
    if state != "PASS":
        return state, measured
    if of_slot is None:
        return "ERROR", "generation of the slot not reported"
    if of_slot < (wanted := max(generation, of_gpu or 0)):
        return ("WARN" if is_of_site else "FAIL"), f"a slot of generation {of_slot:g} of {wanted:g}"
    return "PASS", measured


def judge_mig(row: Row) -> Opinion:
    """A GPU in MIG mode gives slices and has no NVLink; a pending mode begins with the next reset."""
    modes = {key: row.get(f"mig.mode.{key}", "") for key in ("current", "pending")}
    if modes["current"] == "Enabled":
        return "FAIL", "MIG is enabled"
    if modes["current"] != "Disabled":
        return "WARN", f"MIG mode not reported ({modes['current'] or 'empty'})"
    return ("PASS", "Disabled") if modes["pending"] == "Disabled" else ("WARN", f"MIG pending: {modes['pending']}")


def judge_recovery(row: Row) -> Opinion:
    """What the driver wants of this GPU; where all counters are 0 nothing else may show it."""
    action = row.get("gpu_recovery_action", "")
    known = load_gpu_errors()["recovery"].get(action)
    if known is not None:
        return known["verdict"], f"recovery action {action}"
    is_without = action in ("[N/A]", "[Not Supported]")
    return ("WARN" if is_without else "ERROR"), f"recovery action not reported ({action or 'empty'})"


def judge_power(row: Row, least_w: float) -> Opinion:
    """A lowered limit slows the GPU down without a throttle reason that is a fault."""
    limit, default = (parse_number(row.get(key, "")) for key in ("power.limit", "power.default_limit"))
    if limit is None:
        return "WARN", f"power limit not reported ({row.get('power.limit') or 'empty'})"
    wanted = max(least_w, default or 0.0)
    return ("PASS", f"{limit:g} W") if limit >= wanted else ("WARN", f"limited to {limit:g} of {wanted:g} W")


def judge_persistence(row: Row) -> Opinion:
    """Without it the driver unloads between jobs and the first CUDA call of each takes tens of seconds."""
    mode = row.get("persistence_mode", "")
    return ("PASS", mode) if mode == "Enabled" else ("WARN", mode or "not reported")


def judge_fabric(row: Row) -> Opinion:
    """NVSwitch needs the fabric manager. Drivers from 570 on may print a label in the cell: `state  Completed`."""
    state, status = (_LABEL.sub("", row.get(f"fabric.{key}", "")).strip() for key in ("state", "status"))
    if (state, status) == ("Completed", "Success"):
        return "PASS", "Completed"
    if not state or state.startswith("[") or state in ("N/A", "Not Supported"):
        return "WARN", f"not reported ({state or 'empty'})"
    return "FAIL", f"{state}, {status}"


def _truth(text: str) -> bool | None:
    """A counter or a Yes/No as a bool; None for anything else."""
    if text.lower() in ("yes", "no"):
        return text.lower() == "yes"
    number = parse_number(text)
    return None if number is None else number > 0
