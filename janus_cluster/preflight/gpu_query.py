"""nvidia-smi's CSV output: one query per family of fields; lines that are no row are kept as damage or as warnings."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from janus_cluster.preflight.command import CommandOutput, run_command

PROGRAM = "nvidia-smi"

# Queried family by family: one field that a driver does not know makes it refuse the whole query. Of several forms the
# first that the driver accepts is taken.
FAMILIES: dict[str, tuple[tuple[str, ...], ...]] = {
    "identity": (("index", "uuid", "name", "memory.total", "driver_version", "pci.bus_id"),),
    "ecc": (
        (
            "index",
            "ecc.errors.uncorrected.volatile.total",
            "ecc.errors.uncorrected.aggregate.total",
            "ecc.errors.uncorrected.aggregate.sram.thresholdExceeded",
        ),
        ("index", "ecc.errors.uncorrected.volatile.total", "ecc.errors.uncorrected.aggregate.total"),
    ),
    # The older name is queried where the newer one is refused (drivers before 535.54.03).
    "throttle": (("index", "clocks_event_reasons.active"), ("index", "clocks_throttle_reasons.active")),
    "pcie": (
        ("index", "pcie.link.width.current", "pcie.link.gen.max", "pcie.link.gen.gpumax"),
        ("index", "pcie.link.width.current", "pcie.link.gen.max"),
    ),
    "persistence": (("index", "persistence_mode"),),
    "fabric": (("index", "fabric.state", "fabric.status"),),
    "mig": (("index", "mig.mode.current", "mig.mode.pending"),),
    "recovery": (("index", "gpu_recovery_action"),),
    "power": (("index", "power.limit", "power.default_limit"),),
}
# Queried while the probe runs. pstate shows whether the GPU was busy.
_LOAD = (
    "index",
    "pstate",
    "pcie.link.gen.current",
    "pcie.link.gen.max",
    "pcie.link.width.current",
    "clocks.current.sm",
    "clocks.max.sm",
)
LOAD = (
    (*_LOAD, "clocks_event_reasons.active", "pcie.link.gen.gpumax"),
    (*_LOAD, "clocks_event_reasons.active"),
    (*_LOAD, "clocks_throttle_reasons.active"),
)
# Queried while the job trains.
_HEALTH = ("index", "clocks.current.sm", "clocks.max.sm", "power.draw", "temperature.gpu", "memory.used")
HEALTH = ((*_HEALTH, "clocks_event_reasons.active"), (*_HEALTH, "clocks_throttle_reasons.active"))
REMAPPED = (
    "gpu_uuid",
    "remapped_rows.correctable",
    "remapped_rows.uncorrectable",
    "remapped_rows.pending",
    "remapped_rows.failure",
)
PROCESSES = ("gpu_uuid", "pid", "process_name", "used_gpu_memory")
# What decides which GPUs a process may use.
_ENVIRON = ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE")

# The first column is the index or the UUID.
_KEY = re.compile(r"\d{1,3}|GPU-[0-9a-fA-F-]+", re.ASCII)
_WARNING = re.compile(r"^WARNING:")
_REFUSED = "not a valid field"
_NO_OPTION = "Invalid combination of input arguments"
# nvidia-smi ends with this code after complete output where a GPU's infoROM is corrupted. Source: nvidia-smi manual.
RC_INFOROM = 14


def read_gpu_tables(*, timeout_s: float, environ: Mapping[str, str]) -> dict[str, Any]:
    """Facts: one table a family (`rows`, `damaged`, `warnings`, `refused`, `problem`), `nvlink` as text, `processes`.

    A program that is missing, hangs or lists no GPU is run once, not a dozen times.
    """
    identity = query_gpus(FAMILIES["identity"], timeout_s=timeout_s)
    seen = {name: environ[name] for name in _ENVIRON if name in environ}
    if not identity["rows"]:
        return {**dict.fromkeys([*FAMILIES, "remapped", "nvlink", "processes"], identity), "environ": seen}
    families = [name for name in FAMILIES if name != "identity"]
    with ThreadPoolExecutor(max_workers=4) as pool:

        def ask(option: str) -> Future[CommandOutput]:
            return pool.submit(run_command, [PROGRAM, option, "--format=csv,nounits"], timeout_s=timeout_s)

        nvlink = pool.submit(run_command, [PROGRAM, "nvlink", "-s"], timeout_s=timeout_s)
        remapped = ask(f"--query-remapped-rows={','.join(REMAPPED)}")
        processes = ask(f"--query-compute-apps={','.join(PROCESSES)}")
        pending = {name: pool.submit(query_gpus, FAMILIES[name], timeout_s=timeout_s) for name in families}
        tables = {"identity": identity, **{name: future.result() for name, future in pending.items()}}
        tables["remapped"] = _table(remapped.result(), REMAPPED)
        tables["processes"] = parse_processes(processes.result())
        out = nvlink.result()
    lines = out.stdout.splitlines()
    warnings = [line for line in lines if _WARNING.match(line)]
    text = "\n".join(line for line in lines if not _WARNING.match(line))
    tables["nvlink"] = {"text": text, "warnings": warnings, **_outcome(out)}
    return {**tables, "environ": seen}


def query_gpus(forms: Sequence[Sequence[str]], *, timeout_s: float) -> dict[str, Any]:
    """The table of the first of the `forms` that this driver accepts."""
    for fields in forms:
        out = run_command([PROGRAM, f"--query-gpu={','.join(fields)}", "--format=csv,nounits"], timeout_s=timeout_s)
        if _REFUSED not in out.stdout + out.stderr:
            break
    return _table(out, fields)


def _table(out: CommandOutput, fields: Sequence[str]) -> dict[str, Any]:
    table = parse_table(out.stdout, fields)
    table["warnings"] += [line for line in out.stderr.splitlines() if _WARNING.match(line)]
    return {**table, **_outcome(out)}


def _outcome(out: CommandOutput) -> dict[str, Any]:
    """How the program ended. A corrupted infoROM is no problem of the output."""
    return {
        "problem": None if out.rc == RC_INFOROM else out.problem,
        "error": out.error,
        "rc": out.rc,
        "refused": out.rc not in (0, None) and _REFUSED in out.stdout + out.stderr,
    }


def parse_processes(out: CommandOutput) -> dict[str, Any]:
    """The compute processes, as rows of PROCESSES. A program name may hold commas. `refused`: no such option."""
    rows: list[dict[str, str]] = []
    damaged: list[str] = []
    for line in out.stdout.replace("\0", "").splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if not line.strip() or cells[0] == PROCESSES[0] or _WARNING.match(line):
            continue
        if len(cells) >= len(PROCESSES) and _KEY.fullmatch(cells[0]) and cells[1].isdigit():
            name = ", ".join(cells[2:-1])
            rows.append(dict(zip(PROCESSES, (cells[0], cells[1], name, cells[-1]), strict=True)))
        elif "No running processes found" not in line:
            damaged.append(line.strip()[:200])
    is_refused = out.rc not in (0, None) and (_NO_OPTION in out.stdout or _REFUSED in out.stdout)
    return {"rows": rows, "damaged": damaged, **_outcome(out), "refused": is_refused}


def parse_table(text: str, fields: Sequence[str]) -> dict[str, Any]:
    """CSV with or without its header as rows by field name; other lines are kept under `damaged` or `warnings`.

    A driver may echo a field renamed (clocks_throttle_reasons as clocks_event_reasons) and with a unit
    (`memory.total [MiB]`); columns are then matched by position.
    """
    columns: list[str] = list(fields)
    rows: list[dict[str, str]] = []
    damaged: list[str] = []
    warnings: list[str] = []
    seen: set[str] = set()
    for cells in csv.reader(io.StringIO(text.replace("\0", "")), skipinitialspace=True, strict=False):
        values = [cell.strip() for cell in cells]
        if not any(values):
            continue
        if _WARNING.match(values[0]):
            warnings.append(", ".join(values)[:200])
        elif not rows and _is_header(values, fields):
            columns = _name_columns(values, fields)
        elif len(values) != len(columns) or values[0] in seen or not _KEY.fullmatch(values[0]):
            damaged.append(", ".join(values)[:200])
        else:
            seen.add(values[0])
            rows.append(dict(zip(columns, values, strict=True)))
    return {"rows": rows, "damaged": damaged, "warnings": warnings}


def _is_header(values: Sequence[str], fields: Sequence[str]) -> bool:
    """Whether the line names a column for each of the fields, at least one of them by the name it was asked for."""
    names = _name_columns(values, fields)
    is_like_one = not _KEY.fullmatch(values[0]) and not {v.split(" [", 1)[0] for v in values}.isdisjoint(fields)
    return is_like_one and len(values) == len(fields) and set(names) == set(fields)


def _name_columns(values: Sequence[str], fields: Sequence[str]) -> list[str]:
    names = [v.split(" [", 1)[0] for v in values]
    return [name if name in fields else field for name, field in zip(names, fields, strict=False)]
