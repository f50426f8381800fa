"""The GPUs while the probe runs: PCIe generation, which an idle link lowers, and what holds the clocks down.

The generation is judged by the GPU's own highest and the profile's; what the slot allows (pcie.link.gen.max) is itself
under test.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.preflight.gpu import parse_number
from janus_cluster.preflight.gpu_health import Opinion, judge_pcie, judge_throttle
from janus_cluster.preflight.gpu_known import LOST, Row, is_same_for_all
from janus_cluster.preflight.gpu_query import LOAD, query_gpus
from janus_cluster.preflight.model import Check
from janus_cluster.run.records.verdict import CheckResult, join_few, worst

_EVERY_S = 0.5
_MOST_SAMPLES = 128


class GpuSampler:
    """Inside `with`, queries nvidia-smi periodically; `samples` are its tables. Stops after one query that hangs."""

    def __init__(self, *, timeout_s: float) -> None:
        self.samples: list[dict[str, Any]] = []
        self._timeout_s = timeout_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> GpuSampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(self._timeout_s + 2)

    def _run(self) -> None:
        every_s = _EVERY_S
        while not self._stop.wait(every_s):
            self.samples.append(query_gpus(LOAD, timeout_s=self._timeout_s))
            if self.samples[-1]["error"] is not None:
                return
            if len(self.samples) >= _MOST_SAMPLES:
                # Half as many, from the whole time: a probe may take minutes.
                self.samples[:] = self.samples[::2]
                every_s *= 2


def loads_gpus(resolved: ResolvedJob) -> bool:
    """Whether the probe puts a load on GPUs that the profile judges."""
    return bool(resolved.preflight_thresholds["gpu"]["wanted"]) and resolved.job.hardware.device == "cuda"


def judge_gpu_load(
    samples: Sequence[Mapping[str, Any]] | None, profile: Mapping[str, Any], *, node: str, gpus_per_node: int
) -> list[CheckResult]:
    """Each GPU's PCIe link and clocks over all samples; ERROR where nvidia-smi gave no value, never a pass.

    `samples`: tables of nvidia-smi taken while the probe ran; None where it was not queried.
    """
    width, generation = int(profile["pcie_width_min"]), int(profile["pcie_generation"])
    pcie = Check(
        id="gpu.pcie_load",
        node=node,
        expected=f"x{width} and generation {generation} while the probe runs",
        source=f"{profile['source']}; pcie.link.gen.gpumax",
        phase="active",
    )
    clocks = Check(
        id="gpu.throttle_load",
        node=node,
        expected="none of 0x8 0x20 0x40 0x80 while the probe runs",
        source="NVML API reference, nvmlClocksEventReasons",
        phase="active",
    )
    problem = _problem(samples)
    if problem is not None or not samples:
        fix = f"on {node}: timeout 20 nvidia-smi; see the node's log of this attempt"
        return [check.judged("ERROR", problem or "", fix=fix) for check in (pcie, clocks)]
    rows: dict[str, list[Row]] = {str(i): [] for i in range(gpus_per_node)}
    for sample in samples:
        for row in sample["rows"]:
            rows.setdefault(row.get("index", "?"), []).append(row)
    top = max((parse_number(r.get("clocks.current.sm", "")) or 0 for own in rows.values() for r in own), default=0)
    detail = f"{len(rows)} GPUs, {len(samples)} samples, SM clock up to {top:g} MHz"
    slots = [row for own in rows.values() for row in own[:1]]
    is_of_site = len(slots) == len(rows) and is_same_for_all(slots, "pcie.link.gen.max")
    links = {index: judge_link(own, width, generation=generation, is_of_site=is_of_site) for index, own in rows.items()}
    reasons = {index: _worst_of([judge_throttle(row) for row in own]) for index, own in rows.items()}
    pcie_fix = f"on {node}: nvidia-smi -q | grep -A8 'GPU Link Info' under load; reseat the GPU board, BIOS link speed"
    clock_fix = f"on {node}: nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER under load; fans, inlet air, power supplies"
    return [_sum_up(pcie, links, detail, pcie_fix), _sum_up(clocks, reasons, detail, clock_fix)]


def judge_link(rows: Sequence[Row], width: int, *, generation: int | None = None, is_of_site: bool = False) -> Opinion:
    """One GPU: the narrowest width and the best generation seen. WARN for one that was never seen busy.

    The generation wanted is the greatest of the profile's, the GPU's own (gpumax) and the slot's (max).
    is_of_site: every GPU has the same slot, so that a slot of an older generation is the machine's kind: WARN.
    """
    if not rows:
        return "ERROR", "did not answer"
    if lost := next((value for row in rows for value in row.values() if LOST.search(value)), None):
        return "FAIL", lost
    narrow = _worst_of([judge_pcie(row, width) for row in rows])
    if narrow[0] != "PASS":
        return narrow
    seen = [parse_number(row.get("pcie.link.gen.current", "")) for row in rows]
    of_slot, of_gpu = (parse_number(rows[0].get(f"pcie.link.gen.{key}", "")) for key in ("max", "gpumax"))
    known = [n for n in seen if n is not None]
    if len(known) < len(rows) or of_slot is None:
        return "ERROR", "generation not reported"
    best, wanted = max(known), max(of_slot, of_gpu or 0, generation or 0)
    measured = f"generation {best:g} of {wanted:g}"
    if best >= wanted:
        return "PASS", measured
    if best >= of_slot:
        return ("WARN" if is_of_site else "FAIL"), f"{measured}: the slot allows no more"
    is_busy = any(row.get("pstate") == "P0" for row in rows)
    return ("FAIL", f"{measured} in P0") if is_busy else ("WARN", f"{measured}, but never seen in P0")


def _problem(samples: Sequence[Mapping[str, Any]] | None) -> str | None:
    if samples is None:
        return "nvidia-smi was not queried while the probe ran"
    if not samples:
        return "the probe was over before nvidia-smi was queried"
    for sample in samples:
        problem = sample["error"] or sample["problem"] or (sample["damaged"] and f"not parsed: {sample['damaged'][0]}")
        if problem:
            return str(problem)
    return None


def _worst_of(opinions: Sequence[Opinion]) -> Opinion:
    state = worst([state for state, _ in opinions])
    return next(((s, text) for s, text in opinions if s == state), ("ERROR", "did not answer"))


def _sum_up(check: Check, opinions: Mapping[str, Opinion], detail: str, fix: str) -> CheckResult:
    findings = [f"GPU {index}: {text}" for index, (state, text) in opinions.items() if state != "PASS"]
    state = worst([state for state, _ in opinions.values()])
    return check.judged(state, join_few(findings) or detail, fix=fix)
