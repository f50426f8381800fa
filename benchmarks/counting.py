"""What a step does, counted rather than timed: module calls, waits for the device, collectives, operators, memory.

A wait is what stops the host until an accelerator is done: reading a value back (item, tolist, int(), bool()), asking
how many elements a mask picks (nonzero, boolean indices), copying from or to unpinned memory. On the CPU nothing waits,
so the calls that would are counted; tensors made on the host on purpose are recognised by following them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.profiler import ProfilerActivity, profile

READS = frozenset(
    (
        "item", "tolist", "numpy", "cpu", "__int__", "__float__", "__bool__", "__index__", "__format__",
        "__contains__", "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "equal", "allclose",
    )
)  # fmt: skip
FROM_LISTS = frozenset(("tensor", "new_tensor", "as_tensor"))
# Lengths of windows are on the host there, made before anything is counted.
_ON_HOST_AT = ("model/vision.py",)
_IGNORED_FRAMES = ("torch/", "benchmarks/counting.py", "contextlib.py")


@dataclass
class Counts:
    """One step's counts. `waits_at` names the lines of code, most frequent first."""

    module_calls: int = 0
    host_waits: int = 0
    waits_at: dict[str, int] = field(default_factory=dict)
    collectives: dict[str, int] = field(default_factory=dict)
    operators: int = 0
    peak_bytes: int = 0


class HostWaits(TorchFunctionMode):
    """Counts waits while it is entered, with the place in the code that asked."""

    def __init__(self) -> None:
        super().__init__()
        self.at: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = (resolve_name(func) or getattr(func, "__name__", "")).rsplit(".", 1)[-1]
        given = list(_tensors((args, kwargs)))
        on_host = all(getattr(tensor, "_on_host", False) for tensor in given) and "device" not in kwargs
        from_list = name in FROM_LISTS and (kwargs.get("device") is not None or name == "new_tensor")
        if from_list or (given and not on_host and _waits(name, args)):
            self._add(name)
        to_device = name == "to" and _names_device(args[1:], kwargs)
        if to_device and all(getattr(t, "_on_host", False) for t in given) and not kwargs.get("non_blocking"):
            self._add(name)
        result = func(*args, **kwargs)
        if name == "cpu" or (on_host and not to_device):
            for tensor in _tensors(result):
                tensor._on_host = True  # type: ignore[attr-defined]
        return result

    def _add(self, name: str) -> None:
        caller = _caller()
        if not caller.startswith(_ON_HOST_AT):
            self.at[f"{name} at {caller}"] += 1


def _names_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return "device" in kwargs or any(isinstance(a, (torch.device, str, Tensor)) for a in args)


def _waits(name: str, args: tuple[Any, ...]) -> bool:
    if name in ("__getitem__", "__setitem__"):
        indices = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(i, Tensor) and i.dtype == torch.bool for i in indices)
    if name == "repeat_interleave":
        return len(args) > 1 and isinstance(args[1], Tensor)
    return name in READS


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


def _caller() -> str:
    frame = sys._getframe(3)
    while frame.f_back is not None and any(part in frame.f_code.co_filename for part in _IGNORED_FRAMES):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno}"


def count_step(step: Callable[[], object]) -> Counts:
    """What one call of `step` does. It is called three times: each way of counting would disturb the others."""
    counts = Counts()

    def called(module: Any, inputs: Any) -> None:
        counts.module_calls += 1

    handle = torch.nn.modules.module.register_module_forward_pre_hook(called)
    try:
        step()
    finally:
        handle.remove()
    with HostWaits() as waits:
        step()
    counts.waits_at = dict(waits.at.most_common())
    counts.host_waits = sum(waits.at.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    for event in profiled.key_averages():
        if event.key.startswith("c10d::"):
            counts.collectives[event.key.removeprefix("c10d::")] = event.count
        elif event.key.startswith("aten::"):
            counts.operators += event.count
    counts.peak_bytes = _peak_bytes(profiled)
    return counts


def _peak_bytes(profiled: Any) -> int:
    """Most memory that tensors made in the profiled region took at one time."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes):
        held += change
        peak = max(peak, held)
    return peak
