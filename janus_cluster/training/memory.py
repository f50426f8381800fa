"""Compare the GPUs' measured peak with what training.memory: auto planned, and warn near the GPU's limit.

A CPU has no such peak, so nothing is logged there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from janus_cluster.job.resolved import MemoryPlan
from janus_cluster.run.records.metrics import MemoryEvent
from janus_cluster.training.metrics import MetricsLog
from janus_cluster.training.pulse import Pulse

# Above this share of a GPU the next longer sample, or fragmentation, may be too much.
NEARLY_FULL = 0.95


class MemoryWatch(TrainerCallback):  # type: ignore[misc]
    """Reports each step to the node; logs once on rank 0 how full the GPUs are, and once that one is too full."""

    def __init__(
        self, *, metrics: MetricsLog, pulse: Pulse, memory: MemoryPlan | None, device: torch.device, resume: str
    ) -> None:
        self._metrics = metrics
        self._pulse = pulse
        self._memory = memory
        self._resume = resume
        is_gpu = device.type == "cuda"
        self._gpu_gb = torch.cuda.get_device_properties(device).total_memory / 1e9 if is_gpu else None
        self._has_logged = self._has_warned = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._pulse.step_done()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        peaks_gb = self._metrics.ranks.get("gpu_memory_peak_gb")
        if self._memory is None or self._gpu_gb is None or not peaks_gb or "loss" not in (logs or {}):
            return
        event = compare_memory(self._memory, peaks_gb=peaks_gb, gpu_gb=self._gpu_gb, resume=self._resume)
        is_new_warning = event.warning is not None and not self._has_warned
        if self._has_logged and not is_new_warning:
            return
        self._has_logged, self._has_warned = True, self._has_warned or is_new_warning
        self._metrics.append(replace(event, step=state.global_step))
        self._metrics.log(
            f"memory: {event.planned_gb:.1f} GB planned, {event.measured_gb:.1f} GB measured, rank {event.rank}"
        )
        if event.warning is not None:
            self._metrics.log(f"warning: memory: {event.warning}")


def compare_memory(memory: MemoryPlan, *, peaks_gb: Sequence[float], gpu_gb: float, resume: str) -> MemoryEvent:
    """The fullest rank's peak so far against the plan; `warning` holds what to type where it is near the GPU's end.

    Units: GB of 1e9 bytes; a peak is that of allocated tensors. `resume`: the command.
    """
    measured = max(peaks_gb)
    rank = list(peaks_gb).index(measured)
    warning = None
    if measured > NEARLY_FULL * gpu_gb:
        smaller = memory.next_as_options()
        way = f"{resume} {smaller}" if smaller else "a new run with a shorter data.history or a smaller data.max_pixels"
        warning = (
            f"rank {rank} has used {measured:.1f} of its GPU's {gpu_gb:.1f} GB ({measured / gpu_gb:.0%}); "
            f"should it run out: {way}"
        )
    return MemoryEvent(
        planned_gb=memory.option.planned_gb,
        measured_gb=measured,
        rank=rank,
        gpu_gb=round(gpu_gb, 2),
        option=memory.option.words,
        warning=warning,
    )
