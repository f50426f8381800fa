"""This process among all others: rank, device and process group, as torchrun describes them."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from janus_cluster.errors import JanusError, UsageError
from janus_cluster.stamped import stamp_output
from janus_cluster.training.data.indexing import Share


@dataclass(frozen=True)
class World:
    """Where this process stands. `local_rank` counts within the node, `rank` over all nodes."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def backend(self) -> str:
        return "nccl" if self.device.type == "cuda" else "gloo"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_node_main(self) -> bool:
        return self.local_rank == 0


def load_world(device: str, environment: Mapping[str, str] | None = None) -> World:
    """This process's place, from the variables that torchrun sets. No process group is made.

    Raises: UsageError if torchrun did not start this process, or the device is not there.
    """
    variables = os.environ if environment is None else environment
    try:
        rank, local_rank, world_size = (int(variables[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"RANK, LOCAL_RANK and WORLD_SIZE must be integers in the environment ({type(error).__name__}: {error})",
            hint="start this module with torchrun: python -m torch.distributed.run --nproc-per-node 1 -m MODULE …",
        ) from error
    if device == "cpu":
        return World(rank, local_rank, world_size, torch.device("cpu"))
    if torch.cuda.device_count() <= local_rank:
        raise UsageError(
            f"hardware.device is cuda, but local rank {local_rank} on {socket.gethostname()} sees "
            f"{torch.cuda.device_count()} GPUs (CUDA_VISIBLE_DEVICES={variables.get('CUDA_VISIBLE_DEVICES', 'unset')})",
            hint="compare hardware.gpus_per_node with `nvidia-smi -L` on that node, or set hardware.device: cpu",
        )
    return World(rank, local_rank, world_size, torch.device("cuda", local_rank))


@contextmanager
def process_group(world: World, *, timeout_s: float) -> Iterator[None]:
    """All ranks can talk inside the block, and the group is gone after it; groups made there wait as long as this one.

    A process that leaves without taking the group down aborts (exit −6) while another rank still listens. Only after
    an error it is left standing: others may sit in a collective that this rank never joins, and NCCL would wait for
    them here; torchrun ends them once this process has.
    """
    timeout = timedelta(seconds=timeout_s)
    # Without it they would wait 10 minutes over NCCL, whatever the job says. DeepSpeed makes one for ZeRO's reductions:
    # a hung rank would end the others there before the attempt's watchdog could name it.
    vars(distributed_c10d).update(default_pg_timeout=timeout, default_pg_nccl_timeout=timeout)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
        dist.init_process_group("nccl", timeout=timeout, device_id=bound_to(world.device, torch.__version__))
    else:
        dist.init_process_group("gloo", timeout=timeout)
    yield
    # All together: taking the group down is a collective of NCCL's own, and rank 0 may have an export still to write.
    dist.barrier()
    dist.destroy_process_group()


def bound_to(device: torch.device, torch_version: str) -> torch.device | None:
    """The device that a group is bound to: it connects at once, and barriers know where. None where torch hangs so.

    Source: pytorch/pytorch#153960; DeepSpeed leaves it away for the same versions (comm/torch.py).
    """
    return None if torch_version.startswith("2.7.0") else device


def share_among(world: World) -> Share:
    """Rank 0 makes a value and all ranks have it; alone, where there is no process group."""
    return Share(is_builder=world.is_main, broadcast=_broadcast_from_main)


def _broadcast_from_main(value: Any) -> Any:
    if not dist.is_initialized():
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def run_and_leave(main: Callable[[], None]) -> NoReturn:
    """`main` has run and this process is over: exit code 0, or the error's own code with its traceback on stderr.

    It leaves at once. DeepSpeed keeps its gloo groups to the end and their threads die badly with the interpreter:
    otherwise about 1 run in 20 that had finished all its work was reported as aborted (exit −6).
    """
    exit_code = 0
    try:
        main()
    except Exception as error:
        exit_code = error.exit_code if isinstance(error, JanusError) else 1
        # A log that cannot be written, on a full disk, must not take the place of the error.
        with suppress(OSError):
            traceback.print_exc()
            if isinstance(error, JanusError) and error.hint:
                print(f"hint: {error.hint}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(exit_code)


def redirect_output(path: Path) -> None:
    """Everything this process writes to stdout and stderr from here on is appended to `path`, C++ code's too.

    Lines that Python prints begin with their time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    stamp_output()
