"""Errors of GPUs (Xid) and NVSwitches (SXid) that the NVIDIA driver has written to the kernel's log since boot.

One faulty kernel of a user writes hundreds of lines, so they are counted by address and code before anything is cut.
What a code means is data: templates/gpu_errors.yaml.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from janus_cluster.job.templates import load_gpu_errors
from janus_cluster.preflight.command import run_command
from janus_cluster.preflight.model import Check
from janus_cluster.run.records.verdict import CheckResult, State, join_few, worst

_LARGEST_LOG_BYTES = 256_000_000  # a ring buffer of the kernel is far smaller
_MOST_UNREAD = 5
_SHOWN = 3
_DETAIL = 120
# A line of the driver's that reports an error; one that then does not parse is kept as unread.
_EXPECTED = re.compile(r"NVRM: Xid\b|nvswitch\w*: SXid\b|\bSXid \(")
_ERROR = re.compile(
    r"(?P<kind>S?Xid) \((?:PCI:)?(?P<address>[0-9a-fA-F]+(?::[0-9a-fA-F]+)+)(?:\.[0-9a-fA-F]+)?(?:[ ,][^)]*)?\): "
    r"(?P<code>\d{1,5})\b,? ?(?P<detail>.*)"
)
_SEVERITY = re.compile(r"\b(?P<non>non-?)?fatal\b", re.IGNORECASE)
_RECOVERY = re.compile(r"changed from .*? to 0x[0-9a-fA-F]+ \((?P<action>[^)]+)\)")
# After one of these the driver has initialised every GPU anew.
_RESTARTED = re.compile(r"NVRM: loading NVIDIA|Linux version \d")
_STAMP = re.compile(r"^\[\s*(?P<bracketed>[^\]]+)\]|^(?P<iso>\d{4}-\d\d-\d\d\S*)")
_REFUSED = re.compile(r"not permitted|permission denied", re.IGNORECASE)

Event = dict[str, Any]


def read_kernel_log(*, timeout_s: float) -> dict[str, Any]:
    """Facts: the driver's errors in dmesg, counted, and why the log may be incomplete."""
    out = run_command(["dmesg"], timeout_s=timeout_s, most_bytes=_LARGEST_LOG_BYTES)
    return {**parse_kernel_log(out.stdout.splitlines()), "problem": out.problem}


def parse_kernel_log(lines: Iterable[str]) -> dict[str, Any]:
    """`events`: one for each kind, address and code, with count, first and last time, and whether a restart followed.

    `unread`: the first lines that report an error and do not parse, `num_unread` how many there are.
    """
    events: dict[tuple[str, str, int], Event] = {}
    unread: list[str] = []
    num_unread = 0
    for line in lines:
        if _RESTARTED.search(line):
            for event in events.values():
                event["restart"] = _time_of(line)
        elif _EXPECTED.search(line):
            found = _ERROR.search(line)
            if found is None:
                num_unread += 1
                unread += [line[:200]] if num_unread <= _MOST_UNREAD else []
                continue
            _add(events, found, _time_of(line))
    return {"events": list(events.values()), "unread": unread, "num_unread": num_unread}


def _add(events: dict[tuple[str, str, int], Event], found: re.Match[str], time: str) -> None:
    kind, address, code, detail = found["kind"].lower(), found["address"].lower(), int(found["code"]), found["detail"]
    event = events.setdefault(
        (kind, address, code),
        {"kind": kind, "address": address, "code": code, "count": 0, "first": time, "severity": None, "action": None},
    )
    event |= {"count": event["count"] + 1, "last": time, "restart": None}
    if severity := _SEVERITY.search(detail):
        is_fatal = severity["non"] is None or event["severity"] == "fatal"
        event["severity"] = "fatal" if is_fatal else "non-fatal"
    event["detail"] = event.get("detail") or detail[:_DETAIL]
    if recovery := _RECOVERY.search(detail):
        event["action"] = recovery["action"]
        if recovery["action"] == "None":
            # The driver itself reports that this GPU needs nothing any more.
            for other in events.values():
                if other["address"] == address:
                    other["restart"] = time


def _time_of(line: str) -> str:
    """The line's own stamp, seconds since boot as dmesg prints them; empty without one."""
    stamp = _STAMP.match(line)
    return (stamp["bracketed"] or stamp["iso"] or "").strip() if stamp else ""


def judge_xids(fact: Mapping[str, Any], profile: Mapping[str, Any], *, node: str) -> list[CheckResult]:
    """FAIL for an error that calls for a reset, a reboot or a repair that has not followed; WARN for an unknown one.

    A line that does not parse, or a log that is incomplete, is ERROR; a log that this user may not read is SKIP.
    """
    if not profile["wanted"]:
        return []
    expected = "no Xid or SXid that calls for a reset, a reboot or a repair"
    check = Check(id="gpu.xid", node=node, expected=expected, source="NVIDIA Xid catalogue (gpu_errors.yaml)")
    catalogue = load_gpu_errors()
    judged = [(*_judge_event(event, catalogue), event) for event in fact["events"]]
    states: list[State] = [state for state, _, _ in judged] or ["PASS"]
    findings = [f"{_describe(event)}{note}" for wanted in ("FAIL", "ERROR", "WARN") for state, note, event in judged
                if state == wanted]  # fmt: skip
    fixes = [_fix_of(event, catalogue) for state, _, event in judged if state == "FAIL"]
    problem = fact["problem"]
    if problem and _REFUSED.search(problem) and not fact["events"]:
        return [check.judged("SKIP", f"the kernel's log may not be read by this user ({problem})")]
    if problem:
        states.append("ERROR")
        findings.append(problem)
    if fact["num_unread"]:
        states.append("ERROR")
        findings.append(f"{fact['num_unread']} lines that could not be read: {fact['unread'][0]}")
    fix = f"on {node}: dmesg | grep -i xid; {next(iter(fixes), 'look the code up in the Xid catalogue')}"
    count = sum(event["count"] for event in fact["events"])
    measured = join_few(findings, most=_SHOWN) or f"{count} Xids, none of them hardware"
    return [check.judged(worst(states), measured, fix=fix)]


def _judge_event(event: Event, catalogue: Mapping[str, Any]) -> tuple[State, str]:
    """The state, and what else there is to report of the event."""
    state = _verdict_of(event, catalogue)
    if state == "FAIL" and event["restart"] is not None:
        return "WARN", f", before the restart at {event['restart'] or 'an unknown time'}"
    return state, ""


def _verdict_of(event: Event, catalogue: Mapping[str, Any]) -> State:
    if event["kind"] == "sxid":
        by_severity: dict[str | None, State] = {"fatal": "FAIL", "non-fatal": "WARN", None: "ERROR"}
        return by_severity[event["severity"]]
    entry = catalogue["xids"].get(event["code"])
    if entry is None:
        return "WARN"
    row = _row_of(event, entry, catalogue)
    if event["severity"] == "non-fatal" and "if_nonfatal" in row:
        nonfatal: State = row["if_nonfatal"]
        return nonfatal
    verdict: State = entry.get("verdict") or row["verdict"]
    return verdict


def _row_of(event: Event, entry: Mapping[str, Any], catalogue: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row of the action: the one that the line itself names, else that of the code."""
    default: Mapping[str, Any] = catalogue["actions"][entry["action"]]
    named: Mapping[str, Any] = catalogue["recovery"].get(event["action"], default)
    return named


def _fix_of(event: Event, catalogue: Mapping[str, Any]) -> str:
    if event["kind"] == "sxid":
        return "drain the node; restart nvidia-fabricmanager and reset all GPUs, or reboot"
    entry = catalogue["xids"].get(event["code"], {})
    return str(entry.get("fix") or _row_of(event, entry, catalogue).get("fix", ""))


def _describe(event: Event) -> str:
    """`XID 79 (GPU has fallen off the bus) at 0000:1e:00, once, at 1000.0`."""
    if event["kind"] == "sxid":
        name, means = "SXID", f"{event['severity'] or 'severity not in the log'}, {event['detail']}"
    else:
        entry = load_gpu_errors()["xids"].get(event["code"], {})
        name, means = "XID", event["action"] or entry.get("means", event["detail"])
    times = "once" if event["count"] == 1 else f"{event['count']} times"
    when = event["first"] if event["count"] == 1 else f"{event['first']} to {event['last']}"
    return f"{name} {event['code']} ({means}) at {event['address']}, {times}" + (f", at {when}" if when else "")
