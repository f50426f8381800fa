"""XID errors that the NVIDIA driver has written to the kernel's log since boot."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from janus_cluster.preflight.command import run_command
from janus_cluster.preflight.model import Check, CheckResult

# Source: NVIDIA GPU debug guidelines, XID errors: those that call for a reset, a reboot or another GPU.
FATAL = {
    48: "double-bit ECC error",
    62: "micro-controller halt",
    64: "row remapping failed",
    74: "NVLink error",
    79: "GPU has fallen off the bus",
    92: "high single-bit ECC rate",
    95: "uncontained ECC error",
    119: "GSP does not answer",
    120: "GSP error",
    140: "unrecovered ECC error",
    143: "GPU initialisation failed",
}
# What a job did wrong, not the hardware: 13 and 31 are bad accesses, 43 and 45 a stopped process, 63 and 94 contained.
BENIGN = frozenset({13, 31, 43, 45, 63, 68, 94})
_XID = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)\): (\d+)")
_REFUSED = re.compile(r"not permitted|permission denied", re.IGNORECASE)


def read_kernel_log(*, timeout_s: float) -> dict[str, Any]:
    """Facts: the driver's lines of dmesg, or why there are none."""
    out = run_command(["dmesg"], timeout_s=timeout_s)
    lines = [line for line in out.stdout.splitlines() if "Xid" in line]
    return {"lines": lines[-200:], "problem": out.problem}


def parse_xids(lines: list[str]) -> list[tuple[str, int]]:
    """(PCI address, code) of every XID line."""
    return [(m[1], int(m[2])) for line in lines if (m := _XID.search(line))]


def judge_xids(fact: dict[str, Any], profile: dict[str, Any], *, node: str) -> list[CheckResult]:
    """FAIL for a code that means broken hardware, WARN for an unknown one; without permission SKIP, and why."""
    if not profile["wanted"]:
        return []
    expected = "no XID that means broken hardware"
    check = Check(id="gpu.xid", node=node, expected=expected, source="NVIDIA XID errors")
    counted = Counter(parse_xids(fact["lines"]))
    fatal = {key: n for key, n in counted.items() if key[1] in FATAL}
    if fatal:
        told = [f"XID {code} ({FATAL[code]}) at {where}, {n} times" for (where, code), n in fatal.items()]
        return [check.judged("FAIL", "; ".join(told[:3]), fix=f"on {node}: dmesg | grep Xid; drain and reset the node")]
    problem = fact["problem"]
    if problem:
        if _REFUSED.search(problem):
            return [check.judged("SKIP", f"the kernel's log may not be read by this user ({problem})")]
        return [check.judged("ERROR", problem, fix=f"on {node}: dmesg | grep Xid")]
    unread = len(fact["lines"]) - sum(counted.values())
    other = [f"XID {code} at {where}" for where, code in counted if code not in BENIGN]
    if other or unread:
        told = [*other[:3], *([f"{unread} lines that could not be read"] if unread else [])]
        return [check.judged("WARN", "; ".join(told), fix=f"on {node}: dmesg | grep Xid; look the code up")]
    return [check.judged("PASS", f"{sum(counted.values())} XIDs, none of them hardware")]
