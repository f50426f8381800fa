"""NVLink as `nvidia-smi nvlink -s` reports it: every GPU with the same number of active links."""

from __future__ import annotations

import re
from typing import Any

from janus_cluster.preflight.gpu_known import find_lost, find_mig, known_gpus
from janus_cluster.preflight.model import Check
from janus_cluster.run.records.verdict import CheckResult, State, join_few, worst

_GPU = re.compile(r"^GPU (\d+): (.*?)(?: \(UUID: .*\))?$")
_LINK = re.compile(r"^Link (\d+): (.+)$")
_ALL_INACTIVE = re.compile(r"NVLink information as all links are inactive")
_SPEED = re.compile(r"^\d+(?:\.\d+)? GB/s$")


def parse_nvlink(text: str) -> dict[str, Any]:
    """GPU index → its name, links and the lines of its block that are none; all such lines also under `damaged`."""
    gpus: dict[str, dict[str, Any]] = {}
    damaged: list[str] = []
    block: dict[str, Any] | None = None
    for raw in text.splitlines():
        line = raw.strip()
        gpu, link = _GPU.match(line), _LINK.match(line)
        if gpu and gpu[1] not in gpus:
            block = gpus[gpu[1]] = {"name": gpu[2], "links": {}, "damaged": []}
        elif link and block is not None and link[1] not in block["links"]:
            block["links"][link[1]] = link[2]
        elif line and not (_ALL_INACTIVE.search(line) and block is not None and not block["links"]):
            damaged.append(line[:200])
            if block is not None:
                block["damaged"].append(line[:200])
            block = None if gpu else block
    return {"gpus": gpus, "damaged": damaged}


def judge_nvlink(
    tables: dict[str, Any], profile: dict[str, Any], *, node: str, gpus_per_node: int
) -> list[CheckResult]:
    """PASS only with the profile's number of active links on every GPU; a PCIe card has none by design.

    A part may list more links than are wired: the inactive ones count only where active ones are too few.
    A GPU that needs a reset, or is in MIG mode, has no links to judge: the result names the check that reports it.
    Returns: nothing where the profile requires no GPU, or nvidia-smi lists none (gpu.count reports that).
    """
    if not profile["wanted"] or not tables["identity"]["rows"]:
        return []
    excused = dict.fromkeys(find_mig(tables), "gpu.mig (MIG has no NVLink)")
    excused |= dict.fromkeys(find_lost(tables), "gpu.reset")
    known, fact = known_gpus(tables, gpus_per_node, excused=excused), tables["nvlink"]
    parsed = parse_nvlink(fact["text"] if fact["error"] is None else "")
    listed = sorted(parsed["gpus"].items(), key=lambda item: int(item[0]))
    gpus = [(index, gpu) for index, gpu in listed if index not in excused]
    active = {index: sum(bool(_SPEED.match(v)) for v in gpu["links"].values()) for index, gpu in gpus}
    # Without a number of its own the profile expects of each GPU what the best of them has.
    wanted = max(active.values(), default=0) if profile["nvlink_links"] is None else int(profile["nvlink_links"])
    expected = f"{wanted} active links on each of {gpus_per_node} GPUs"
    check = Check(id="gpu.nvlink", node=node, expected=expected, source=profile["nvlink_source"], unit="links")
    if gpus and not any(active.values()) and all("PCIe" in gpu["name"] for _, gpu in gpus):
        return [check.judged("SKIP", f"{gpus[0][1]['name']}: a PCIe card has no active NVLink by design")]
    states: list[State] = ["PASS" if n == wanted else "WARN" if n > wanted else "FAIL" for n in active.values()]
    findings = [_describe(index, gpu["links"], wanted) for index, gpu in gpus if active[index] != wanted]
    problem = fact["error"] or (fact["problem"] if not known.rc or fact.get("rc") != known.rc else None)
    of_excused = {line for index, gpu in listed if index in excused for line in gpu["damaged"]}
    damaged = [line for line in parsed["damaged"] if line not in known.reported and line not in of_excused]
    num = len(parsed["gpus"].keys() & known.keys)
    if problem or damaged or num != known.num or (known.is_complete and len(listed) != num):
        states.append("ERROR")
        findings.append(problem or f"{num} of {known.num} GPUs answered")
        findings += damaged[:2]
    left_out = [f"GPU {index}: see {excused[index]}" for index, _ in listed if index in excused]
    if not states:
        return [check.judged("SKIP", join_few(left_out) or "no GPU answered")]
    fix = f"on {node}: nvidia-smi nvlink -s; nvidia-smi nvlink -e; systemctl status nvidia-fabricmanager"
    measured = "; ".join(findings[:4]) or "; ".join([f"{wanted} on each of {len(gpus)} GPUs", *left_out[:2]])
    return [check.judged(worst(states), measured, fix=fix)]


def _describe(index: str, links: dict[str, str], wanted: int) -> str:
    dead = [n for n, value in links.items() if not _SPEED.match(value)]
    down = f", down: {', '.join(dead)} ({links[dead[0]]})" if dead else ""
    return f"GPU {index}: {len(links) - len(dead)} of {wanted} links{down}"
