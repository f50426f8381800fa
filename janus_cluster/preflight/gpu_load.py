"""The GPUs while the probe runs: PCIe generation, which an idle link lowers, and what holds the clocks down."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from janus_cluster.config.schema import ResolvedJob
from janus_cluster.preflight.gpu import parse_number
from janus_cluster.preflight.gpu_health import Opinion, Row, judge_pcie, judge_throttle
from janus_cluster.preflight.gpu_query import LOAD, ask_gpus
from janus_cluster.preflight.model import Check, CheckResult, worst

_EVERY_S = 0.5
_MOST_SAMPLES = 128
_SHOWN = 3


class GpuSampler:
    """Inside `with`, nvidia-smi is asked again and again; `samples` are its tables. One that hangs is asked once."""

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
            self.samples.append(ask_gpus(LOAD, timeout_s=self._timeout_s))
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
    """Each GPU's PCIe link and clocks over all samples; ERROR where nvidia-smi did not tell, never a pass.

    `samples`: tables of nvidia-smi taken while the probe ran; None where it was not asked.
    """
    width = int(profile["pcie_width_min"])
    pcie = Check(
        id="gpu.pcie_load",
        node=node,
        expected=f"x{width} and the link's highest generation while the probe runs",
        source=f"{profile['source']}; pcie.link.gen.max",
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
    links = {index: judge_link(own, width) for index, own in rows.items()}
    reasons = {index: _worst_of([judge_throttle(row) for row in own]) for index, own in rows.items()}
    pcie_fix = f"on {node}: nvidia-smi -q | grep -A8 'GPU Link Info' under load; reseat the GPU board, BIOS link speed"
    clock_fix = f"on {node}: nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER under load; fans, inlet air, power supplies"
    return [_sum_up(pcie, links, detail, pcie_fix), _sum_up(clocks, reasons, detail, clock_fix)]


def judge_link(rows: Sequence[Row], width: int) -> Opinion:
    """One GPU: the narrowest width seen, and the best generation. One that never left idle has not shown its own."""
    if not rows:
        return "ERROR", "did not answer"
    narrow = _worst_of([judge_pcie(row, width) for row in rows])
    if narrow[0] != "PASS":
        return narrow
    seen = [parse_number(row.get("pcie.link.gen.current", "")) for row in rows]
    most = [parse_number(row.get("pcie.link.gen.max", "")) for row in rows]
    known = [n for n in seen if n is not None]
    if len(known) < len(rows) or most[0] is None:
        return "ERROR", "generation not told"
    told = f"generation {max(known):g} of {most[0]:g}"
    if max(known) >= most[0]:
        return "PASS", told
    is_busy = any(row.get("pstate") == "P0" for row in rows)
    return ("FAIL", f"{told} in P0") if is_busy else ("WARN", f"{told}, but never seen in P0")


def _problem(samples: Sequence[Mapping[str, Any]] | None) -> str | None:
    if samples is None:
        return "nvidia-smi was not asked while the probe ran"
    if not samples:
        return "the probe was over before nvidia-smi was asked"
    for sample in samples:
        told = sample["error"] or sample["problem"] or (sample["damaged"] and f"not understood: {sample['damaged'][0]}")
        if told:
            return str(told)
    return None


def _worst_of(opinions: Sequence[Opinion]) -> Opinion:
    state = worst([state for state, _ in opinions])
    return next(((s, text) for s, text in opinions if s == state), ("ERROR", "did not answer"))


def _sum_up(check: Check, opinions: Mapping[str, Opinion], detail: str, fix: str) -> CheckResult:
    told = [f"GPU {index}: {text}" for index, (state, text) in opinions.items() if state != "PASS"]
    more = f"; and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
    state = worst([state for state, _ in opinions.values()])
    return check.judged(state, "; ".join(told[:_SHOWN]) + more if told else detail, fix=fix)
