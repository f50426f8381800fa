"""GPU count, model and memory as nvidia-smi tells them."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
from functools import partial
from typing import Any

from janus_cluster.preflight.model import CheckResult

_QUERY = ("nvidia-smi", "--query-gpu=index,name,memory.total", "--format=csv,noheader,nounits")
_TIMEOUT_S = 30  # nvidia-smi hangs in D state on a broken GPU


def read_gpus() -> dict[str, Any]:
    """Facts: nvidia-smi's rows, or why there are none."""
    if shutil.which(_QUERY[0]) is None:
        return {"error": "nvidia-smi is not on PATH"}
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"nvidia-smi did not answer within {_TIMEOUT_S} s"}
    if done.returncode != 0:
        return {"error": f"nvidia-smi ended with {done.returncode}: {(done.stderr or done.stdout).strip()[:200]}"}
    return parse_gpus(done.stdout)


def parse_gpus(text: str) -> dict[str, Any]:
    """nvidia-smi's CSV as rows; a line of another shape (a lost GPU) is kept under `damaged`, never counted."""
    gpus: list[dict[str, Any]] = []
    damaged: list[str] = []
    for row in csv.reader(io.StringIO(text), skipinitialspace=True):
        if len(row) == 3 and row[0].isdigit() and row[2].strip().isdigit():
            gpus.append({"index": int(row[0]), "name": row[1].strip(), "memory_mib": int(row[2])})
        elif row:
            damaged.append(", ".join(row))
    return {"gpus": gpus, "damaged": damaged}


def judge_gpus(facts: dict[str, Any], profile: dict[str, Any], *, node: str, gpus_per_node: int) -> list[CheckResult]:
    """PASS only for exactly the wanted number of the wanted model; SKIP where the profile wants none."""
    expected = f"{gpus_per_node} × {profile.get('name', 'GPU')}"
    result = partial(
        CheckResult, id="gpu", phase="static", node=node, expected=expected, threshold_source=profile["source"]
    )
    if not profile["wanted"]:
        return [result(expected="none", state="SKIP", measured="this profile wants no GPU")]
    fix = f"on {node}: nvidia-smi -L; drain the node if a GPU is missing"
    if "error" in facts:
        return [result(state="ERROR", measured=facts["error"], fix=fix)]
    good = [g for g in facts["gpus"] if g["name"] == profile["name"] and g["memory_mib"] >= profile["memory_mib_min"]]
    names = sorted({g["name"] for g in facts["gpus"]})
    measured = f"{len(facts['gpus'])} × {' / '.join(names) or 'nothing'}"
    if facts["damaged"]:
        measured += f"; {facts['damaged'][0]}"
    is_sound = len(good) == len(facts["gpus"]) == gpus_per_node and not facts["damaged"]
    return [result(state="PASS" if is_sound else "FAIL", measured=measured, fix="" if is_sound else fix)]
