"""Processes that write checkpoints and agree on one, as training's ranks do.

Usage: checkpoint_worker.py save FOLDER STEP MEGABYTES…     (each rank writes so many; the last number goes on)
       checkpoint_worker.py resume FOLDER                   (prints what it goes on from, as JSON)
       checkpoint_worker.py resume-with-another-view FOLDER FILE   (the same, but rank 1 sees an empty FILE there)
       checkpoint_worker.py save-slowly FOLDER STEP         (writes for a minute, to be killed meanwhile)
Under torchrun, or alone.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from janus_cluster.training.checkpoint import agree_on_resume
from janus_cluster.training.saving import new_checkpoint
from janus_cluster.training.world import World, process_group, run_and_leave

CLONE_NEWNS = 0x00020000


def main() -> None:
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    world = World(rank, rank, world_size, torch.device("cpu"))
    if world_size == 1:
        work(world, sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
        return
    with process_group(world, timeout_s=60):
        work(world, sys.argv[1], Path(sys.argv[2]), sys.argv[3:])


def work(world: World, what: str, checkpoints: Path, arguments: list[str]) -> None:
    if what == "resume-with-another-view" and world.rank == 1:
        see_as_empty(checkpoints / arguments[0])
    if what.startswith("resume"):
        found = agree_on_resume(checkpoints, resume="auto", world=world, report=lambda line: None)
        passed_over = [(p.path.name, p.reason) for p in found.passed_over]
        name = None if found.checkpoint is None else found.checkpoint.name
        output = json.dumps({"rank": world.rank, "checkpoint": name, "passed_over": passed_over})
        # One write: unbuffered, print would write the line and its end apart, and another rank's in between.
        os.write(1, f"{output}\n".encode())
        return
    step, megabytes = int(arguments[0]), [float(a) for a in arguments[1:]]
    with new_checkpoint(checkpoints, step=step, world=world, keep_last=2, about={"zero_stage": 3}) as aside:
        folder = aside / f"checkpoint-{step}"
        (folder / "state").mkdir(parents=True, exist_ok=True)
        if what == "save-slowly":
            for n in range(600):
                (folder / "state" / f"{n}.bin").write_bytes(os.urandom(1 << 20))
                time.sleep(0.1)
        num_numbers = int(megabytes[min(world.rank, len(megabytes) - 1)] * 1e6 / 4)
        if dist.is_initialized():
            dist.barrier()
        torch.save(torch.rand(num_numbers), folder / "state" / f"rank{world.rank}.pt")


def see_as_empty(path: Path) -> None:
    """This process, and no other, finds nothing in the file."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    with tempfile.NamedTemporaryFile(delete=False) as empty:
        subprocess.run(["mount", "--bind", empty.name, path], check=True)


if __name__ == "__main__":
    run_and_leave(main)
