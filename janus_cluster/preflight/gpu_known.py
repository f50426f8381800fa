"""The GPUs that nvidia-smi lists, and those of them whose fault one check reports for all others."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# nvidia-smi prints these in place of any value. Source: NVML, nvmlErrorString.
LOST = re.compile(r"requires? reset|reset required|GPU is lost", re.IGNORECASE)

Row = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Gpus:
    """The GPUs of the identity table.

    keys:     index and UUID of each.
    num:      how many; the checks of health are of these.
    reported: damaged lines that gpu.count has reported; rc: the exit code that it has.
    excused:  key → the check that has reported why this GPU gives no values.
    """

    keys: frozenset[str]
    num: int
    reported: frozenset[str]
    rc: int
    excused: Mapping[str, str]

    @property
    def is_complete(self) -> bool:
        """Nothing is wrong with the list of GPUs itself."""
        return not self.reported and self.rc == 0


def known_gpus(tables: Mapping[str, Any], gpus_per_node: int, *, excused: Mapping[str, str]) -> Gpus:
    """The GPUs that the identity table lists. With too few or too many of them the list is not complete."""
    identity = tables["identity"]
    rows = [row for row in identity["rows"] if row["index"].isdigit() and int(row["index"]) < gpus_per_node]
    odd = [", ".join(row.values()) for row in identity["rows"] if row not in rows]
    missing = ["missing"] if len(rows) != gpus_per_node else []
    return Gpus(
        keys=frozenset(row[key] for row in rows for key in ("index", "uuid")),
        num=len(rows),
        reported=frozenset([*identity["damaged"], *odd, *missing]),
        rc=(identity.get("rc") or 0) if identity["problem"] else 0,
        excused=excused,
    )


def keys_of(index: str, tables: Mapping[str, Any]) -> set[str]:
    """Index and UUID of the GPU of that index or UUID."""
    rows = tables["identity"]["rows"]
    return {index} | {row[key] for row in rows if index in (row["index"], row["uuid"]) for key in ("index", "uuid")}


def find_lost(tables: Mapping[str, Any]) -> dict[str, str]:
    """Key of a GPU → the words with which nvidia-smi reports, in any field, that it needs a reset or is lost."""
    found: dict[str, str] = {}
    for table in tables.values():
        for row in table.get("rows", []):
            words = next((v for v in row.values() if LOST.search(v)), None)
            key = row.get("index") or row.get("gpu_uuid", "")
            if words is not None:
                found |= dict.fromkeys(keys_of(key, tables), words)
        for line in table.get("damaged", []):
            # A row with fields missing begins with its index as well.
            key, _, rest = line.partition(", ")
            if LOST.search(rest) and key in {k for row in tables["identity"]["rows"] for k in row.values()}:
                found |= dict.fromkeys(keys_of(key, tables), rest)
    return found


def find_mig(tables: Mapping[str, Any]) -> set[str]:
    """The keys of the GPUs in MIG mode."""
    rows = tables.get("mig", {}).get("rows", [])
    return {key for row in rows if row.get("mig.mode.current") == "Enabled" for key in keys_of(row["index"], tables)}


def is_same_for_all(rows: Sequence[Row], field: str) -> bool:
    """Whether several GPUs report one value: it is then the machine's and not one slot's."""
    return len(rows) > 1 and len({row.get(field) for row in rows}) == 1
