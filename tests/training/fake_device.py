"""A device that works beside the host, as a GPU does, for DeepSpeed on a machine without one.

DeepSpeed's CPU accelerator reports that all work is done when a call returns, and its engines then skip streams, events
and synchronisation. Here they take the way they take on a GPU, and every synchronisation is counted with its place.
"""

from __future__ import annotations

import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator


class FakeStream:
    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *error: Any) -> None: ...


class FakeEvent:
    def __init__(self, **options: Any) -> None:
        self.recorded_s = 0.0

    def record(self, stream: Any = None) -> None:
        self.recorded_s = time.perf_counter()

    def query(self) -> bool:
        return True

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: FakeEvent) -> float:
        return (end.recorded_s - self.recorded_s) * 1e3


class FakeDevice(CPU_Accelerator):  # type: ignore[misc]
    """DeepSpeed's CPU accelerator, asynchronous; `synchronised` counts per place, as file:function."""

    Stream = FakeStream
    Event = FakeEvent

    def __init__(self) -> None:
        super().__init__()
        self.synchronised: Counter[str] = Counter()
        self._default_stream = FakeStream()
        # Tensors of the CPU know no streams.
        torch.Tensor.record_stream = lambda tensor, stream: None  # type: ignore[method-assign]

    def is_synchronized_device(self) -> bool:
        return False

    def synchronize(self, device_index: Any = None) -> None:
        caller = traceback.extract_stack(limit=2)[0]
        self.synchronised[f"{Path(caller.filename).name}:{caller.name}"] += 1

    def stream(self, stream: Any) -> FakeStream:
        return self._default_stream

    def current_stream(self, device_index: Any = None) -> FakeStream:
        return self._default_stream

    def default_stream(self, device_index: Any = None) -> FakeStream:
        return self._default_stream
