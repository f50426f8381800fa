"""Traces of torch's flight recorder as NCCL's watchdog writes them, for tests on machines without NCCL."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Their shape is that of torch 2.13 for CUDA; the analysis of torch reads them.
VERSION = "2.10"


def entry(number: int, name: str = "all_reduce", *, group: str = "0", state: str = "completed", size: int = 8) -> Any:
    return {
        "record_id": number,
        "pg_id": int(group),
        "process_group": (group, "default_pg" if group == "0" else "undefined"),
        "thread_name": "python",
        "thread_id": "1",
        "collective_seq_id": number,
        "p2p_seq_id": 0,
        "op_id": number,
        "profiling_name": f"nccl:{name}",
        "time_created_ns": 10**9 * number,
        "input_sizes": [[size]],
        "input_dtypes": ["BFloat16"],
        "output_sizes": [[size]],
        "output_dtypes": ["BFloat16"],
        "state": state,
        "time_discovered_started_ns": None,
        "time_discovered_completed_ns": None,
        "retired": state == "completed",
        "timeout_ms": 7_200_000,
        "is_p2p": False,
    }


def trace(entries: Sequence[Any], *, world_size: int = 4) -> dict[str, Any]:
    groups = sorted({e["process_group"] for e in entries} | {("0", "default_pg")})
    ranks = str(list(range(world_size)))
    return {
        "version": VERSION,
        "pg_config": {name: {"name": name, "desc": desc, "ranks": ranks} for name, desc in groups},
        "pg_status": {},
        "comm_lib_version": "2.29.7",
        "entries": list(entries),
    }


def write_trace(path: Path, entries: Sequence[Any], *, world_size: int = 4) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(trace(entries, world_size=world_size), protocol=2))
