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
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, record

from janus_cluster.errors import JanusError, UsageError
from janus_cluster.janusvln.data.indexing import Share
from janus_cluster.run.stamped import stamp_output

T = TypeVar("T")
_P = ParamSpec("_P")


@dataclass(frozen=True)
class World:
    """This process among all. `local_rank` counts within the node, `rank` over all nodes."""

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
    """All ranks can communicate inside the block, and the group is gone after it; groups made there use its time-out.

    A process that leaves without destroying the group aborts (exit −6) while another rank still listens. Only after
    an error it is not destroyed: other ranks may be in a collective that this rank never joins, and NCCL would wait for
    them here; torchrun ends them once this process has.
    """
    timeout = timedelta(seconds=timeout_s)
    # Without it they would wait 10 minutes over NCCL, for any value in the job. DeepSpeed makes one for ZeRO's
    # reductions: a hung rank would end the others there before the attempt's watchdog could name it.
    vars(distributed_c10d).update(default_pg_timeout=timeout, default_pg_nccl_timeout=timeout)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
        # Bound to its device, a group connects at once, and barriers know where.
        dist.init_process_group("nccl", timeout=timeout, device_id=world.device)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    yield
    # All together: taking the group down is a collective of NCCL's own, and rank 0 may have an export still to write.
    dist.barrier()
    dist.destroy_process_group()


def share_among(world: World) -> Share:
    """Rank 0 makes a value and all ranks have it; alone, where there is no process group."""
    return Share(is_builder=world.is_main, broadcast=lambda value: from_main(world, lambda: value))


def from_main(world: World, make: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank."""
    made: list[Any] = [make() if world.is_main else None]
    if dist.is_initialized():
        dist.broadcast_object_list(made, src=0)
    found: T = made[0]
    return found


def gather(own: T) -> list[T]:
    """Every rank's value, in the order of the ranks, on every rank."""
    if not dist.is_initialized():
        return [own]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def group_size() -> int:
    """How many ranks there are to share work with."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all() -> None:
    """Wait until every rank has called this."""
    if dist.is_initialized():
        dist.barrier()


class ErrorFile(ErrorHandler):
    """torchrun's error file of this process. An error that it cannot take, on a full disk, is raised as it was."""

    def record_exception(self, e: BaseException) -> None:
        with suppress(OSError):
            super().record_exception(e)


def error_recorded(main: Callable[_P, None]) -> Callable[_P, None]:
    """`main`, whose exception torchrun finds in the error file that it named to this process."""
    return record(main, ErrorFile())


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
