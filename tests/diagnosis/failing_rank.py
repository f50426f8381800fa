"""One rank that fails in the way of FAILURE, on global rank FAILING_RANK; started by torchrun as training.entry is."""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from janus_cluster.janusvln.data.images import load_frame
from janus_cluster.job.schema import Data
from janus_cluster.run.paths import RunDir
from janus_cluster.training.failure import failure_recorded
from janus_cluster.training.world import load_world, process_group, redirect_output, run_and_leave

TIMEOUT_S = 5


@record
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--attempt", type=int)
    parser.add_argument("--node")
    args = parser.parse_args()
    run, world = RunDir(args.run_dir), load_world("cpu")
    is_failing, kind = world.rank == int(os.environ["FAILING_RANK"]), os.environ["FAILURE"]
    if is_failing and kind == "abort_at_start":
        fail("abort", run)
    redirect_output(run.rank_log(args.attempt, args.node, world.rank))
    failure_json = run.rank_failure_json(args.attempt, world.rank)
    with (
        failure_recorded(failure_json, rank=world.rank, node=args.node),
        process_group(world, timeout_s=TIMEOUT_S),
    ):
        dist.all_reduce(torch.ones(1))
        if is_failing:
            fail(kind, run)
        dist.all_reduce(torch.ones(1))


def fail(kind: str, run: RunDir) -> None:
    if kind == "exception":
        raise ValueError("a mask of the wrong shape")
    if kind == "signal":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "host_out_of_memory":
        torch.empty(1 << 50)
    if kind == "abort":
        # C++'s operator new: its std::bad_alloc cannot pass through Python, as in a library's thread.
        ctypes.CDLL("libstdc++.so.6")._Znwm(ctypes.c_size_t(1 << 60))
    if kind == "disk_full":
        with open("/dev/full", "w") as f:  # noqa: PTH123
            f.write("x" * 100_000)
    if kind == "bad_data":
        path = run.path / "torn picture.png"
        path.write_bytes(b"no picture")
        load_frame(path, Data())
    if kind == "nccl_timeout":
        time.sleep(60)


if __name__ == "__main__":
    run_and_leave(main)
