"""States of GPUs in which nvidia-smi prints something else than a number: one cause is one line, and none is a pass."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from node_faults import replaced, smi
from node_fixtures import DRIVER, NUM, FakeNode, gpu_rows, h800_node, smi_texts, uuid

from janus_cluster.job.profiles import load_preflight_profile
from janus_cluster.preflight.command import CommandOutput
from janus_cluster.preflight.gpu import count_visible
from janus_cluster.preflight.gpu_processes import judge_processes
from janus_cluster.preflight.gpu_query import parse_processes
from janus_cluster.run.records.verdict import CheckResult

GPU = load_preflight_profile("h800-ib")["gpu"]
INFOROM = "WARNING: infoROM is corrupted at gpu 0000:1D:00.0\n"


@pytest.fixture(autouse=True)
def without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests themselves may run in a Slurm job, or with GPUs hidden."""
    for name in list(os.environ):
        if name.startswith("SLURM_") or name == "CUDA_VISIBLE_DEVICES":
            monkeypatch.delenv(name)


def gpu_results(node: FakeNode) -> dict[str, CheckResult]:
    return {check: r for check, r in node.write().judge().items() if check.startswith("gpu.")}


def faults(node: FakeNode) -> dict[str, str]:
    return {check: r.state for check, r in gpu_results(node).items() if r.state not in ("PASS", "SKIP")}


def without(*families: str, **changes: str) -> dict[str, str]:
    """A driver that does not know the fields of these families."""
    return {name: text for name, text in (smi_texts() | changes).items() if name not in families}


def prints(text: str, rc: int) -> dict[str, str]:
    """An nvidia-smi that prints this, whatever it is asked."""
    return {"nvidia-smi": f"#!/bin/sh\ncat <<'X'\n{text}\nX\nexit {rc}\n"}


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [
        ("ecc", "6, 0, 0, No", "6, [GPU requires reset], [GPU requires reset], [GPU requires reset]"),
        ("throttle", "6, 0x0000000000000001", "6, [GPU requires reset]"),
        ("pcie", "6, 16, 5, 5", "6, [GPU requires reset], [GPU requires reset], 5"),
        ("persistence", "6, Enabled", "6, [GPU is lost]"),
        ("fabric", "6, Completed, Success", "6, [GPU requires reset], [GPU requires reset]"),
        ("recovery", "6, None", "6, [GPU requires reset]"),
        ("power", "6, 700.00, 700.00", "6, [GPU requires reset], 700.00"),
        ("remapped", f"{uuid(6)}, 0, 0, 0, 0", f"{uuid(6)}, 0, 0, [GPU requires reset], 0"),
        # With fields missing.
        ("power", "6, 700.00, 700.00", "6, [GPU requires reset]"),
    ],
)
def test_a_gpu_that_needs_a_reset_in_any_field_is_one_fault_of_that_gpu(
    tmp_path: Path, family: str, old: str, new: str
) -> None:
    results = gpu_results(h800_node(tmp_path, smi=replaced(family, old, new)))
    assert {check: r.state for check, r in results.items() if r.state not in ("PASS", "SKIP")} == {"gpu.reset": "FAIL"}
    assert results["gpu.reset"].measured.startswith("GPU 6: ")
    assert "-i 6" in results["gpu.reset"].fix
    assert results["gpu.ecc"].measured == "7 GPUs; GPU 6: see gpu.reset"


def test_a_reset_does_not_hide_the_fault_of_another_gpu(tmp_path: Path) -> None:
    texts = replaced("throttle", "6, 0x0000000000000001", "6, [GPU requires reset]")
    texts["ecc"] = texts["ecc"].replace("4, 0, 0", "4, 2, 2")
    assert faults(h800_node(tmp_path, smi=texts)) == {"gpu.reset": "FAIL", "gpu.ecc": "FAIL"}


@pytest.mark.parametrize("num", [1, NUM])
def test_mig_is_one_fault_and_what_it_hides_names_it(tmp_path: Path, num: int) -> None:
    texts = smi_texts()
    for i in range(num):
        texts["mig"] = texts["mig"].replace(f"{i}, Disabled, Disabled", f"{i}, Enabled, Enabled")
        texts["remapped"] = texts["remapped"].replace(
            f"{uuid(i)}, 0, 0, 0, 0", f"{uuid(i)}, [N/A], [N/A], [N/A], [N/A]"
        )
        links = "".join(f"\t Link {k}: 26.562 GB/s\n" for k in range(8))
        head = f"(UUID: {uuid(i)})\n"
        not_supported = "Nvlink queries are not supported for Devices in MIG mode\n"
        texts["nvlink"] = texts["nvlink"].replace(head + links, head + not_supported)
    results = gpu_results(h800_node(tmp_path, smi=texts))
    assert {check: r.state for check, r in results.items() if r.state not in ("PASS", "SKIP")} == {"gpu.mig": "FAIL"}
    assert "nvidia-smi -mig 0" in results["gpu.mig"].fix
    assert results["gpu.nvlink"].state == ("SKIP" if num == NUM else "PASS")
    assert "MIG" in results["gpu.nvlink"].measured
    assert "gpu.mig" in results["gpu.remapped_rows"].measured


def test_links_without_a_value_are_no_pass_where_mig_is_off(tmp_path: Path) -> None:
    lines = smi_texts()["nvlink"].replace("\t Link 0: 26.562 GB/s", "Nvlink queries are not supported", 1)
    assert faults(h800_node(tmp_path, smi=smi(nvlink=lines))) == {"gpu.nvlink": "FAIL"}


@pytest.mark.parametrize(
    ("action", "state"),
    [
        ("Reset", "FAIL"),
        ("Reboot", "FAIL"),
        ("Drain P2P", "FAIL"),
        ("Drain and Reset", "FAIL"),
        ("[N/A]", "WARN"),
        ("Something new", "ERROR"),
    ],
)
def test_the_drivers_own_recovery_action_is_asked(tmp_path: Path, action: str, state: str) -> None:
    assert faults(h800_node(tmp_path, smi=replaced("recovery", "6, None", f"6, {action}"))) == {"gpu.recovery": state}


@pytest.mark.parametrize(
    ("family", "old", "new", "expected"),
    [
        ("mig", "2, Disabled, Disabled", "2, Disabled, Enabled", ("gpu.mig", "WARN", "pending: Enabled")),
        ("power", "2, 700.00, 700.00", "2, 350.00, 700.00", ("gpu.power", "WARN", "350 of 700 W")),
        ("power", "2, 700.00, 700.00", "2, 600.00, 600.00", ("gpu.power", "WARN", "600 of 700 W")),
        ("ecc", "2, 0, 0, No", "2, 0, 0, Yes", ("gpu.ecc", "FAIL", "SRAM error threshold exceeded")),
        ("ecc", "2, 0, 0, No", "2, 0, 0, [Unknown Error]", ("gpu.ecc", "ERROR", "SRAM threshold")),
        ("pcie", "2, 16, 5, 5", "2, 16, 4, 5", ("gpu.pcie_width", "FAIL", "GPU 2: a slot of generation 4 of 5")),
        ("pcie", "2, 16, 5, 5", "2, 16, 4, 4", ("gpu.pcie_width", "FAIL", "GPU 2: a slot of generation 4 of 5")),
        ("pcie", "2, 16, 5, 5", "2, 16, [N/A], 5", ("gpu.pcie_width", "ERROR", "slot not reported")),
        ("fabric", "2, Completed, Success", "2, state  In Progress, status N/A", ("gpu.fabric", "FAIL", "In Progress")),
        ("fabric", "2, Completed, Success", "2, state Completed, status Timeout", ("gpu.fabric", "FAIL", "Timeout")),
    ],
)
def test_each_field_has_its_verdict(
    tmp_path: Path, family: str, old: str, new: str, expected: tuple[str, str, str]
) -> None:
    check, state, word = expected
    results = gpu_results(h800_node(tmp_path, smi=replaced(family, old, new)))
    assert {c: r.state for c, r in results.items() if r.state not in ("PASS", "SKIP")} == {check: state}
    assert word in results[check].measured


def test_a_machine_of_an_older_generation_is_another_kind_and_not_broken(tmp_path: Path) -> None:
    texts = smi(pcie=smi_texts()["pcie"].replace("16, 5, 5", "16, 4, 5"))
    result = gpu_results(h800_node(tmp_path, smi=texts))["gpu.pcie_width"]
    assert result.state == "WARN"
    assert "--set preflight.thresholds.gpu.pcie_generation=4" in result.fix


def test_labels_inside_the_cells_of_the_fabric_are_read(tmp_path: Path) -> None:
    labelled = smi_texts()["fabric"].replace("Completed, Success", "state  Completed, status Success")
    assert faults(h800_node(tmp_path, smi=smi(fabric=labelled))) == {}


def test_fields_that_an_older_driver_does_not_know_are_no_fault(tmp_path: Path) -> None:
    results = gpu_results(h800_node(tmp_path, smi=without("fabric", "mig", "recovery", "power")))
    assert {check: r.state for check, r in results.items() if r.state != "PASS"} == {
        "gpu.fabric": "WARN",
        "gpu.mig": "SKIP",
        "gpu.recovery": "SKIP",
        "gpu.power": "SKIP",
    }
    assert "not a valid field" in results["gpu.recovery"].measured


@pytest.mark.parametrize("family", ["ecc", "throttle", "pcie", "persistence"])
def test_a_field_that_every_driver_knows_is_never_skipped(tmp_path: Path, family: str) -> None:
    assert set(faults(h800_node(tmp_path, smi=without(family))).values()) == {"ERROR"}


@pytest.mark.parametrize(("tail", "shown"), [(INFOROM, f"GPU 2: {INFOROM.strip()}"), ("", "infoROM of a GPU")])
def test_a_corrupted_inforom_is_one_warning(tmp_path: Path, tail: str, shown: str) -> None:
    texts = {name: text + tail for name, text in smi_texts().items()}
    results = gpu_results(h800_node(tmp_path, smi=texts, smi_rc=14))
    assert {check: r.state for check, r in results.items() if r.state != "PASS"} == {"gpu.warnings": "WARN"}
    assert shown in results["gpu.warnings"].measured


def test_a_warning_does_not_stand_in_for_a_missing_gpu(tmp_path: Path) -> None:
    texts = {name: text + INFOROM for name, text in smi_texts().items()}
    texts["ecc"] = texts["ecc"].replace("4, 0, 0, No\n", "")
    assert faults(h800_node(tmp_path, smi=texts, smi_rc=14)) == {"gpu.warnings": "WARN", "gpu.ecc": "ERROR"}


@pytest.mark.parametrize(
    ("text", "rc", "word"),
    [
        ("Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.105", 18, "reboot"),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", 9, "modprobe nvidia"),
        ("Failed to initialize NVML: Unknown Error", 255, "restart it"),
        ("Failed to initialize NVML: Insufficient Permissions", 4, "/dev/nvidia"),
        ("No devices were found", 6, "lspci"),
        ("", 0, "nvidia-smi -L"),
    ],
)
def test_an_nvidia_smi_that_lists_no_gpu_is_one_fault_with_its_cause(
    tmp_path: Path, text: str, rc: int, word: str
) -> None:
    results = gpu_results(h800_node(tmp_path, programs=prints(text, rc)))
    assert {check: r.state for check, r in results.items()} == {"gpu.count": "FAIL", "gpu.xid": "PASS"}
    assert word in results["gpu.count"].fix


def test_a_step_without_gpus_is_no_fault_of_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    node = h800_node(tmp_path, programs=prints("No devices were found", 6)).write()
    result = node.judge()["gpu.count"]
    assert (result.state, "--gres=gpu:8" in result.fix) == ("ERROR", True)
    monkeypatch.setenv("SLURM_STEP_GPUS", "0,1,2,3,4,5,6,7")
    assert node.judge()["gpu.count"].state == "FAIL"


@pytest.mark.slow
def test_a_slow_nvidia_smi_names_persistence_and_the_key(tmp_path: Path) -> None:
    node = h800_node(
        tmp_path, programs={"nvidia-smi": "#!/bin/sh\nexec sleep 30\n"}, sets=("preflight.command_timeout_s=1",)
    )
    result = gpu_results(node)["gpu.count"]
    assert result.state == "ERROR"
    assert "nvidia-persistenced" in result.fix
    assert "preflight.command_timeout_s=" in result.fix


@pytest.mark.slow
def test_queries_that_all_time_out_are_one_error(tmp_path: Path) -> None:
    texts = "\n".join(gpu_rows())
    program = (
        f"#!/bin/sh\ncase \"$1\" in --query-gpu=index,uuid*) cat <<'X'\n{texts}\nX\nexit 0 ;; esac\nexec sleep 60\n"
    )
    node = h800_node(tmp_path, programs={"nvidia-smi": program}, sets=("preflight.command_timeout_s=1",))
    results = gpu_results(node)
    errors = [check for check, r in results.items() if r.state == "ERROR"]
    assert len(errors) == 1
    skipped = [r.measured for r in results.values() if r.state == "SKIP"]
    assert len(skipped) == 10
    assert all(text.startswith(f"as {errors[0]}: nvidia-smi did not answer") for text in skipped)


GPUS = [{"index": str(i), "uuid": uuid(i)} for i in range(NUM)]


@pytest.mark.parametrize(
    ("shown", "num"),
    [
        ("0,1,2,3,4,5,6,7", 8),
        ("7,6,5,4,3,2,1,0", 8),
        (" 0, 1 ", 2),
        (",".join(uuid(i) for i in range(NUM)), 8),
        ("GPU-00000003", 1),
        ("GPU-0000000", 0),
        ("0,1,8,2", 2),
        ("0,-1,1", 1),
        ("0,0", 0),
        ("MIG-GPU-00000000-aaaa/1/0", 0),
        ("NoDevFiles", 0),
        ("", 0),
        ("²", 0),
    ],
)
def test_visible_devices_are_counted_as_cuda_counts_them(shown: str, num: int) -> None:
    assert count_visible(shown, GPUS) == num


def test_gpus_that_cuda_does_not_see_are_a_fault_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = h800_node(tmp_path).write()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    result = node.judge()["gpu.count"]
    assert (result.state, result.blames_node) == ("FAIL", False)
    assert result.measured == "4 of 8 GPUs are visible to CUDA: CUDA_VISIBLE_DEVICES=0,1,2,3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    assert node.judge()["gpu.count"].state == "PASS"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "NoDevFiles")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert "--gres" in node.judge()["gpu.count"].fix


def test_a_job_that_computes_on_cpus_may_hide_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    sets = ("hardware.device=cpu", "environment.profile=cpu", "preflight.profile=h800-ib")
    assert h800_node(tmp_path, sets=sets).write().judge()["gpu.count"].state == "PASS"


def processes(*lines: str) -> dict[str, str]:
    return smi(processes=smi_texts()["processes"] + "".join(f"{line}\n" for line in lines))


def test_a_process_on_a_gpu_is_named_with_pid_user_and_memory(tmp_path: Path) -> None:
    node = h800_node(tmp_path, smi=processes(f"{uuid(3)}, 4242, /opt/env/bin/python3, 40312"))
    status = node.root / "proc" / "4242" / "status"
    status.parent.mkdir(parents=True)
    status.write_text("Name:\tpython3\nUid:\t0\t0\t0\t0\n")
    result = gpu_results(node)["gpu.processes"]
    assert result.state == "FAIL"
    assert result.measured == "GPU 3: pid 4242 of root (/opt/env/bin/python3) holds 40312 MiB"
    assert "ps -fp 4242" in result.fix


@pytest.mark.parametrize(
    ("line", "state"),
    [
        (f"{uuid(0)}, 77, /usr/bin/nv-hostengine, 12", "PASS"),
        (f"{uuid(0)}, 77, dcgm-exporter, [N/A]", "PASS"),
        (f"{uuid(0)}, 77, /home/a/nv-hostengine-fake, 12", "FAIL"),
        (f"{uuid(0)}, 77, [Not Found], [N/A]", "FAIL"),
        (f"{uuid(0)}, 77, python a, b, 1024", "FAIL"),
        ("No running processes found", "PASS"),
        ("[Unknown Error]", "ERROR"),
    ],
)
def test_only_monitoring_programs_may_hold_a_gpu(tmp_path: Path, line: str, state: str) -> None:
    assert gpu_results(h800_node(tmp_path, smi=processes(line)))["gpu.processes"].state == state


def test_an_allowed_program_beside_another_does_not_excuse_it(tmp_path: Path) -> None:
    lines = (f"{uuid(0)}, 77, nv-hostengine, 12", f"{uuid(1)}, 78, python, 900")
    result = gpu_results(h800_node(tmp_path, smi=processes(*lines)))["gpu.processes"]
    assert (result.state, "nv-hostengine" in result.measured) == ("FAIL", False)


def table_of(stdout: str, rc: int) -> dict[str, Any]:
    return parse_processes(
        CommandOutput(program="nvidia-smi", rc=rc, stdout=stdout, stderr="", error=None, duration_s=0.1)
    )


def test_processes_that_could_not_be_listed_are_no_pass() -> None:
    rows = [{"index": str(i), "uuid": uuid(i)} for i in range(NUM)]

    def state(stdout: str, rc: int) -> str:
        tables = {"identity": {"rows": rows, "damaged": [], "problem": None}, "processes": table_of(stdout, rc)}
        (result,) = judge_processes(tables, GPU, node="n1")
        return result.state

    assert state("Invalid combination of input arguments.", 6) == "SKIP"
    assert state("Unable to determine the device handle", 15) == "ERROR"
    assert state("", 255) == "ERROR"
    assert state("", 0) == "PASS"


def test_a_lost_gpu_is_one_fault_and_the_others_are_judged(tmp_path: Path) -> None:
    lost = "Unable to determine the device handle for GPU 0000:20:00.0: GPU is lost.  Reboot the system to recover\n"
    texts = {
        name: text if name in ("nvlink", "processes") else "".join(
            line for line in text.splitlines(keepends=True) if not line.startswith(("5, ", uuid(5)))
        ) + lost
        for name, text in smi_texts().items()
    }  # fmt: skip
    assert faults(h800_node(tmp_path / "lost", smi=texts, smi_rc=15)) == {"gpu.count": "FAIL"}
    texts["ecc"] = texts["ecc"].replace("4, 0, 0", "4, 2, 2")
    assert faults(h800_node(tmp_path / "both", smi=texts, smi_rc=15)) == {"gpu.count": "FAIL", "gpu.ecc": "FAIL"}


def test_the_driver_is_read_from_a_sound_node(tmp_path: Path) -> None:
    node = h800_node(tmp_path).write()
    facts = node.facts(node.resolve())
    assert {row["driver_version"] for row in facts["gpu"]["identity"]["rows"]} == {DRIVER}
