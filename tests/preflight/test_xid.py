"""Errors of the NVIDIA driver in the kernel's log: counted, dated, and judged by what NVIDIA's catalogue asks for."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from node_fixtures import h800_node

from janus_cluster.job.profiles import load_preflight_profile
from janus_cluster.job.templates import load_gpu_errors
from janus_cluster.preflight.xid import judge_xids, parse_kernel_log
from janus_cluster.run.records.verdict import CheckResult
from tests.drawing import drawn

H800 = load_preflight_profile("h800-ib")["gpu"]
FATAL = "[ 1000.000000] NVRM: Xid (PCI:0000:1e:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."
LOADED = "[ 2000.000000] NVRM: loading NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 10:11:16 UTC 2025"


def judge(*lines: str, problem: str | None = None) -> CheckResult:
    (result,) = judge_xids({**parse_kernel_log(lines), "problem": problem}, H800, node="n1")
    return result


def xid(code: int, detail: str = "pid=8, name=python3", *, at: str = "0000:1e:00", time: float = 7.0) -> str:
    return f"[{time:12.6f}] NVRM: Xid (PCI:{at}): {code}, {detail}"


def sxid(code: int, severity: str, *, at: str = "0000:05:00.0") -> str:
    return f"[   18.617069] nvidia-nvswitch0: SXid (PCI:{at}): {code}, {severity}, Link 40 LTSSM Fault Up"


@pytest.mark.parametrize("code", [46, 48, 62, 64, 74, 79, 92, 95, 109, 110, 119, 120, 136, 140, 143, 155, 156, 158])
def test_what_calls_for_a_reset_or_a_repair_fails_with_its_fix(code: int) -> None:
    result = judge(xid(code))
    assert result.state == "FAIL"
    assert f"XID {code} (" in result.measured
    assert "0000:1e:00, once, at 7.0" in result.measured
    assert "n1" in result.fix and "drain" in result.fix


@pytest.mark.parametrize("code", [8, 13, 31, 43, 45, 63, 68, 94])
def test_what_an_application_did_is_no_fault_of_the_node(code: int) -> None:
    assert judge(xid(code)).state == "PASS"


@pytest.mark.parametrize("code", [1, 32, 999])
def test_a_code_that_the_catalogue_does_not_explain_is_a_warning(code: int) -> None:
    result = judge(xid(code))
    assert (result.state, f"XID {code}" in result.measured) == ("WARN", True)


def test_every_action_of_the_catalogue_has_a_verdict() -> None:
    errors = load_gpu_errors()
    assert {entry["action"] for entry in errors["xids"].values()} <= set(errors["actions"])
    assert all(entry["means"] for entry in errors["xids"].values())
    rows = [*errors["actions"].values(), *errors["recovery"].values()]
    assert all(row["verdict"] in ("PASS", "WARN", "ERROR") or row["fix"] for row in rows)


@pytest.mark.parametrize(
    ("action", "state"),
    [
        ("0x0 (None)", "PASS"),
        ("0x1 (GPU Reset Required)", "FAIL"),
        ("0x2 (Node Reboot Required)", "FAIL"),
        ("0x3 (Drain P2P)", "FAIL"),
        ("0x4 (Drain and Reset)", "FAIL"),
        ("0x9 (Something new)", "ERROR"),
    ],
)
def test_154_names_what_the_gpu_needs(action: str, state: str) -> None:
    result = judge(xid(154, f"GPU recovery action changed from 0x0 (None) to {action}"))
    assert result.state == state
    assert state != "FAIL" or "reset" in result.fix or "reboot" in result.fix


def test_a_fatal_error_before_a_flood_of_others_is_found() -> None:
    flood = [xid(13, f"Graphics SM Warp Exception on SM {i}", at="0000:38:00", time=2000 + i) for i in range(5000)]
    result = judge(FATAL, *flood)
    assert (result.state, "XID 79" in result.measured) == ("FAIL", True)
    facts = parse_kernel_log([FATAL, *flood])
    assert [(e["address"], e["code"], e["count"]) for e in facts["events"]] == [
        ("0000:1e:00", 79, 1),
        ("0000:38:00", 13, 5000),
    ]
    assert (facts["events"][1]["first"], facts["events"][1]["last"]) == ("2000.000000", "6999.000000")


def test_a_log_of_megabytes_is_read_to_its_end(tmp_path: Path) -> None:
    text = f"#!/bin/sh\nyes '{xid(13, 'x' * 60)}' | head -n 60000\necho '{xid(79)}'\n"
    result = h800_node(tmp_path, programs={"dmesg": text}).write().judge()["gpu.xid"]
    assert (result.state, "XID 79" in result.measured) == ("FAIL", True)


@pytest.mark.parametrize(
    "restart",
    [
        LOADED,
        "[    0.000000] Linux version 5.15.0-105-generic (buildd@lcy02)",
        xid(154, "GPU recovery action changed from 0x1 (GPU Reset Required) to 0x0 (None)", time=2000.0),
    ],
)
def test_an_error_before_a_reset_or_reboot_is_a_warning_and_one_after_it_fails(restart: str) -> None:
    result = judge(FATAL, restart)
    assert (result.state, "XID 79" in result.measured, "restart" in result.measured) == ("WARN", True, True)
    assert judge(restart, FATAL).state == "FAIL"
    assert judge(FATAL, restart, FATAL).state == "FAIL"


def test_a_recovered_gpu_does_not_excuse_another() -> None:
    recovered = xid(154, "GPU recovery action changed from 0x1 (GPU Reset Required) to 0x0 (None)", at="0000:38:00")
    assert judge(FATAL, recovered).state == "FAIL"


def test_a_fatal_switch_error_fails_and_another_is_a_warning() -> None:
    fatal, follow_up = sxid(20034, "Fatal"), sxid(20034, "Severity 1 Engine instance 40")
    assert judge(fatal, follow_up).state == "FAIL"
    assert "SXID 20034 (fatal, " in judge(fatal, follow_up).measured
    assert judge(follow_up, fatal).state == "FAIL"
    assert judge(sxid(12028, "Non-fatal")).state == "WARN"
    assert judge(sxid(12028, "Non-fatal"), sxid(12028, "Fatal"), sxid(12028, "Non-fatal")).state == "FAIL"
    assert judge(follow_up).state == "ERROR"


def test_an_nvlink_error_that_is_not_fatal_is_a_warning() -> None:
    assert judge(xid(145, "RLW_CTRL Nonfatal XC0 i0 Link 00")).state == "WARN"
    assert judge(xid(149, "NETIR_LINK_EVT Fatal XC0 i0 Link 00")).state == "FAIL"
    assert judge(xid(149)).state == "FAIL"


@pytest.mark.parametrize(
    "line",
    [
        "[1.0] NVRM: Xid (PCI:0000:1e:00 GPU-I:05): 95, pid=9, name=python3, Uncontained ECC error",
        "[Sun Feb 23 16:24:18 2025] NVRM: Xid (PCI:0000:1e:00): 95, pid=2024380, name=nvidia-smi",
        "2025-02-23T16:24:18,100000+00:00 NVRM: Xid (PCI:0000:1e:00): 95, pid=1",
        "[1.0] NVRM: Xid (0000:1e:00): 95, Ch 00000008",
        "[1.0] NVRM: Xid (PCI:0000:1E:00): 95",
    ],
)
def test_each_form_of_the_line_is_read(line: str) -> None:
    (event,) = parse_kernel_log([line])["events"]
    assert (event["address"], event["code"]) == ("0000:1e:00", 95)
    assert judge(line).state == "FAIL"


@pytest.mark.parametrize("line", ["[1.0] NVRM: Xid (PCI:00", "[1.0] nvidia-nvswitch0: SXid (PCI:0000:05:00.0): "])
def test_a_line_of_the_driver_that_does_not_parse_is_an_error(line: str) -> None:
    assert judge(line).state == "ERROR"
    assert line in judge(line).measured
    assert judge(line, FATAL).state == "FAIL"


def test_a_word_of_another_program_is_no_error_of_the_driver() -> None:
    result = judge("[1.0] gpu-monitor: no Xid since boot", "[1.0] systemd[1]: Started Xid exporter.")
    assert (result.state, result.measured) == ("PASS", "0 Xids, none of them hardware")


def test_an_incomplete_log_is_never_a_pass() -> None:
    assert judge(problem="dmesg: read kernel buffer failed: Operation not permitted").state == "SKIP"
    assert judge(problem="dmesg did not answer within 20 s").state == "ERROR"
    assert judge(xid(13), problem="dmesg ended with 1").state == "ERROR"
    assert judge(FATAL, problem="dmesg: Operation not permitted").state == "FAIL"


LINES = [
    FATAL, xid(13), xid(31), xid(109), xid(999), sxid(20034, "Fatal"), sxid(12028, "Non-fatal"), "", "\0", "NVRM: Xid",
    "[1.0] eth0: link up", xid(154, "GPU recovery action changed from 0x0 (None) to 0x2 (Node Reboot Required)"),
]  # fmt: skip


@drawn(150)
@given(
    before=st.lists(st.sampled_from(LINES), max_size=8),
    after=st.lists(st.sampled_from(LINES), max_size=8),
    fault=st.sampled_from([FATAL, xid(109), sxid(20034, "Fatal"), "NVRM: Xid", xid(999)]),
)
def test_no_other_line_turns_a_fault_into_a_pass(before: list[str], after: list[str], fault: str) -> None:
    assert judge(*before, fault, *after).state != "PASS"


@drawn(150)
@given(text=st.text("NVRM: SXid(PC0123456789abcdef),\n[]. Fatlno-", max_size=200))
def test_no_text_crashes_the_reader(text: str) -> None:
    assert judge(*text.splitlines(), problem="dmesg ended with 1").state != "PASS"
