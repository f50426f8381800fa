"""What this rank is doing while training makes no progress: which collective it waits in, and its stack.

torch's flight recorder is read in this process, by another thread than the one that hangs. Which recorder torch has
depends on its version and build: ProcessGroupNCCL's (torch 2.8 for CUDA), or one for gloo (torch 2.13). Without one the
training thread's stack names the collective.
"""

from __future__ import annotations

import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch._C import _distributed_c10d
from torch.distributed import distributed_c10d

from janus_cluster.run.files import write_bytes_atomically
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.stall import Collective, GroupState, StallRecord, parse_groups

_MOST_FRAMES = 4
_C10D = str(Path(distributed_c10d.__file__))


class StallReport:
    """Writes stall/rank<r>.json, and beside it the flight recorder's trace for torch's own analysis."""

    def __init__(self, run: RunDir, *, attempt: int, rank: int, node: str) -> None:
        self._json = run.stall_json(attempt, rank)
        self._trace = run.stall_trace(attempt, rank)
        self._rank, self._node = rank, node
        self._written: tuple[GroupState, ...] | None = None

    def write(self, *, doing: str, step: int, count: int) -> None:
        """The files hold what this process is doing now. Raises: OSError."""
        self._json.parent.mkdir(exist_ok=True)
        trace = read_trace()
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        groups = parse_groups(trace) if trace else read_group_of_stack(frame)
        record = StallRecord(
            rank=self._rank,
            node=self._node,
            time=time.time(),
            count=count,
            doing=doing,
            step=step,
            groups=groups,
            frames=describe_frames(frame),
        )
        record.write(self._json)
        # 0.4 MB a rank, and in a hang always the same.
        if trace and groups != self._written:
            self._written = groups
            write_bytes_atomically(self._trace, pickle.dumps(trace, protocol=2))


def read_trace() -> dict[str, Any] | None:
    """The flight recorder's dump, with the members of every group; None where torch has none or it is switched off."""
    if not dist.is_initialized():
        return None
    name = "_dump_nccl_trace" if dist.get_backend() == "nccl" else "_dump_fr_trace"
    dump: Callable[..., bytes] | None = getattr(_distributed_c10d, name, None)
    if dump is None:
        return None
    # With stacks the pickle is 10 times as large, and the training thread's own stack is in the record.
    trace: dict[str, Any] = pickle.loads(dump(includeCollectives=True, includeStackTraces=False, onlyActive=False))
    if not trace.get("entries"):
        return None
    # gloo leaves out which ranks a group has.
    known = trace.get("pg_config", {})
    trace["pg_config"] = known if "0" in known else read_group_members()
    return trace


def read_group_members() -> dict[str, dict[str, str]]:
    """The process groups of this process as NCCL's dump lists them: name, and the ranks as a text."""
    found = {}
    for group, name in distributed_c10d._world.pg_names.items():
        description = str(getattr(group, "group_desc", "undefined"))
        found[str(name)] = {"name": str(name), "desc": description, "ranks": str(dist.get_process_group_ranks(group))}
    return found


def read_group_of_stack(frame: FrameType | None) -> tuple[GroupState, ...]:
    """The collective that the training thread is in by its stack, where the world's group counts its calls."""
    name = None
    while frame is not None:
        if frame.f_code.co_filename == _C10D:
            # The outermost function of torch.distributed is the one that was called.
            name = frame.f_code.co_name
        frame = frame.f_back
    world = dist.group.WORLD
    if name is None or world is None:
        return ()
    count: Callable[[], int] | None = getattr(world, "_get_sequence_number_for_group", None)
    try:
        number = 0 if count is None else count()
    except RuntimeError:
        # A version whose gloo counts only with TORCH_DISTRIBUTED_DEBUG=DETAIL.
        number = 0
    return (GroupState(name="0", last_number=number, waits_in=Collective(number=number, name=name)),)


def describe_frames(frame: FrameType | None) -> tuple[str, ...]:
    """The innermost frames of a thread, as a traceback names them: the place, and the line of code."""
    found = traceback.extract_stack(frame, limit=_MOST_FRAMES) if frame is not None else []
    places = ((f'File "{f.filename}", line {f.lineno}, in {f.name}', f"  {f.line}" if f.line else "") for f in found)
    return tuple(line for place in places for line in place if line)
