"""nvidia-smi's CSV answers: asked once a family, kept with whatever in them is no row."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from janus_cluster.preflight.command import CommandOutput, run_command

PROGRAM = "nvidia-smi"

# Asked family by family: one field that a driver does not know makes it refuse the whole question.
FAMILIES: dict[str, tuple[tuple[str, ...], ...]] = {
    "identity": (("index", "uuid", "name", "memory.total", "driver_version", "pci.bus_id"),),
    "ecc": (("index", "ecc.errors.uncorrected.volatile.total", "ecc.errors.uncorrected.aggregate.total"),),
    # The older name is asked where the newer one is refused (drivers before 535.54.03).
    "throttle": (("index", "clocks_event_reasons.active"), ("index", "clocks_throttle_reasons.active")),
    "pcie": (("index", "pcie.link.width.current", "pcie.link.width.max", "pcie.link.gen.current"),),
    "persistence": (("index", "persistence_mode"),),
    "fabric": (("index", "fabric.state", "fabric.status"),),
}
# What is asked while the probe runs. pstate tells whether the GPU was busy.
_LOAD = (
    "index",
    "pstate",
    "pcie.link.gen.current",
    "pcie.link.gen.max",
    "pcie.link.width.current",
    "clocks.current.sm",
    "clocks.max.sm",
)
LOAD = ((*_LOAD, "clocks_event_reasons.active"), (*_LOAD, "clocks_throttle_reasons.active"))
REMAPPED = (
    "gpu_uuid",
    "remapped_rows.correctable",
    "remapped_rows.uncorrectable",
    "remapped_rows.pending",
    "remapped_rows.failure",
)


# The first column is the index or the UUID.
_KEY = re.compile(r"\d{1,3}|GPU-[0-9a-fA-F-]+", re.ASCII)


def read_gpu_tables(*, timeout_s: float) -> dict[str, dict[str, Any]]:
    """Facts: one table a family (`rows`, `damaged`, `problem`), plus `nvlink` as text.

    A program that is missing or hangs is asked once, not seven times.
    """
    identity = ask_gpus(FAMILIES["identity"], timeout_s=timeout_s)
    if identity["error"] is not None:
        return dict.fromkeys([*FAMILIES, "remapped", "nvlink"], identity)
    families = [name for name in FAMILIES if name != "identity"]
    with ThreadPoolExecutor(max_workers=4) as pool:
        nvlink = pool.submit(run_command, [PROGRAM, "nvlink", "-s"], timeout_s=timeout_s)
        query = f"--query-remapped-rows={','.join(REMAPPED)}"
        remapped = pool.submit(run_command, [PROGRAM, query, "--format=csv,nounits"], timeout_s=timeout_s)
        asked = {name: pool.submit(ask_gpus, FAMILIES[name], timeout_s=timeout_s) for name in families}
        tables = {"identity": identity, **{name: future.result() for name, future in asked.items()}}
        tables["remapped"] = _table(remapped.result(), REMAPPED)
        out = nvlink.result()
    tables["nvlink"] = {"text": out.stdout, "problem": out.problem, "error": out.error}
    return tables


def ask_gpus(forms: Sequence[Sequence[str]], *, timeout_s: float) -> dict[str, Any]:
    """The table of the first of the questions that this driver understands."""
    for fields in forms:
        out = run_command([PROGRAM, f"--query-gpu={','.join(fields)}", "--format=csv,nounits"], timeout_s=timeout_s)
        if "not a valid field" not in out.stdout + out.stderr:
            break
    return _table(out, fields)


def _table(out: CommandOutput, fields: Sequence[str]) -> dict[str, Any]:
    return {**parse_table(out.stdout, fields), "problem": out.problem, "error": out.error}


def parse_table(text: str, fields: Sequence[str]) -> dict[str, Any]:
    """CSV with or without its header as rows by field name; everything of another shape is kept under `damaged`.

    A driver may echo a field renamed (clocks_throttle_reasons as clocks_event_reasons) and with a unit
    (`memory.total [MiB]`); columns are then told by their place.
    """
    columns: list[str] = list(fields)
    rows: list[dict[str, str]] = []
    damaged: list[str] = []
    seen: set[str] = set()
    for cells in csv.reader(io.StringIO(text.replace("\0", "")), skipinitialspace=True, strict=False):
        values = [cell.strip() for cell in cells]
        if not any(values):
            continue
        if not rows and _is_header(values, fields):
            columns = _name_columns(values, fields)
        elif len(values) != len(columns) or values[0] in seen or not _KEY.fullmatch(values[0]):
            damaged.append(", ".join(values)[:200])
        else:
            seen.add(values[0])
            rows.append(dict(zip(columns, values, strict=True)))
    return {"rows": rows, "damaged": damaged}


def _is_header(values: Sequence[str], fields: Sequence[str]) -> bool:
    return bool({v.split(" [", 1)[0] for v in values} & set(fields)) and not values[0].isdigit()


def _name_columns(values: Sequence[str], fields: Sequence[str]) -> list[str]:
    names = [v.split(" [", 1)[0] for v in values]
    if len(names) == len(fields):
        return [name if name in fields else fields[i] for i, name in enumerate(names)]
    return names
