"""NVLink as `nvidia-smi nvlink -s` tells it: every GPU with the same number of active links."""

from __future__ import annotations

import re
from typing import Any

from janus_cluster.preflight.model import Check, CheckResult, State, worst

_GPU = re.compile(r"^GPU (\d+): (.*?)(?: \(UUID: .*\))?$")
_LINK = re.compile(r"^Link (\d+): (.+)$")
_ALL_INACTIVE = re.compile(r"NVLink information as all links are inactive")
_SPEED = re.compile(r"^\d+(?:\.\d+)? GB/s$")


def parse_nvlink(text: str) -> dict[str, Any]:
    """GPU index → its name and links; every line that is neither GPU nor link nor blank is kept under `damaged`."""
    gpus: dict[str, dict[str, Any]] = {}
    damaged: list[str] = []
    links: dict[str, str] | None = None
    for raw in text.splitlines():
        line = raw.strip()
        gpu, link = _GPU.match(line), _LINK.match(line)
        if gpu and gpu[1] not in gpus:
            links = {}
            gpus[gpu[1]] = {"name": gpu[2], "links": links}
        elif link and links is not None and link[1] not in links:
            links[link[1]] = link[2]
        elif line and not (_ALL_INACTIVE.search(line) and links == {}):
            damaged.append(line[:200])
            links = None if gpu else links
    return {"gpus": gpus, "damaged": damaged}


def judge_nvlink(fact: dict[str, Any], profile: dict[str, Any], *, node: str, gpus_per_node: int) -> list[CheckResult]:
    """PASS only with the profile's number of active links on every GPU; a PCIe card has none by design.

    A part may list more links than are wired: the inactive ones count only where active ones are too few.
    Returns: nothing where the profile wants no GPU, or nvidia-smi was silent (gpu.count tells that).
    """
    if not profile["wanted"] or fact["error"] is not None:
        return []
    wanted = int(profile["nvlink_links"])
    expected = f"{wanted} active links on each of {gpus_per_node} GPUs"
    check = Check(id="gpu.nvlink", node=node, expected=expected, source=profile["nvlink_source"], unit="links")
    parsed = parse_nvlink(fact["text"])
    gpus = sorted(parsed["gpus"].items(), key=lambda item: int(item[0]))
    active = {index: sum(bool(_SPEED.match(v)) for v in gpu["links"].values()) for index, gpu in gpus}
    if gpus and not any(active.values()) and all("PCIe" in gpu["name"] for _, gpu in gpus):
        return [check.judged("SKIP", f"{gpus[0][1]['name']}: a PCIe card has no active NVLink by design")]
    states: list[State] = ["PASS" if n == wanted else "WARN" if n > wanted else "FAIL" for n in active.values()]
    told = [_describe(index, gpu["links"], wanted) for index, gpu in gpus if active[index] != wanted]
    if fact["problem"] or parsed["damaged"] or len(gpus) != gpus_per_node:
        states.append("ERROR")
        told.append(fact["problem"] or f"{len(gpus)} of {gpus_per_node} GPUs answered")
        told += parsed["damaged"][:2]
    fix = f"on {node}: nvidia-smi nvlink -s; nvidia-smi nvlink -e; systemctl status nvidia-fabricmanager"
    return [check.judged(worst(states), "; ".join(told[:4]) or f"{wanted} on each GPU", fix=fix)]


def _describe(index: str, links: dict[str, str], wanted: int) -> str:
    dead = [n for n, value in links.items() if not _SPEED.match(value)]
    down = f", down: {', '.join(dead)} ({links[dead[0]]})" if dead else ""
    return f"GPU {index}: {len(links) - len(dead)} of {wanted} links{down}"
