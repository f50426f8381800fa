"""The process group of a training, and the groups that libraries make beside it."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from training_run import free_port

from janus_cluster.training.world import World, process_group

pytestmark = pytest.mark.train

TIMEOUT_S = 77.0
LEAVING = """
import time
from janus_cluster.training.world import load_world, process_group, run_and_leave

def main():
    world = load_world("cpu")
    with process_group(world, timeout_s=60):
        time.sleep(0 if world.rank else 3)
        done_s = time.time()
    print(done_s, time.time())

run_and_leave(main)
"""
DEFAULTS = ("default_pg_timeout", "default_pg_nccl_timeout")


def test_a_group_that_a_library_makes_waits_as_long_as_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in DEFAULTS:
        # Put back after the test: they are the whole process's.
        monkeypatch.setattr(distributed_c10d, name, getattr(distributed_c10d, name))
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    with process_group(World(0, 0, 1, torch.device("cpu")), timeout_s=TIMEOUT_S):
        made = dist.new_group(ranks=range(1))
        waits = made._get_backend(torch.device("cpu")).options._timeout
        over_nccl = distributed_c10d._get_default_timeout(dist.Backend(dist.Backend.NCCL))
    assert waits == over_nccl == timedelta(seconds=TIMEOUT_S)


def test_no_rank_takes_the_group_down_while_another_still_works() -> None:
    # Rank 0 writes the export while the others have nothing left to do.
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LEAVING],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [rank.communicate(timeout=600)[0].split() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    (worked_until_s, _), (_, left_s) = (map(float, words[-2:]) for words in printed)
    assert left_s >= worked_until_s


def test_a_full_disk_does_not_take_the_place_of_the_errors_exit_code() -> None:
    program = (
        "from janus_cluster.errors import TrainingFailed; from janus_cluster.training.world import run_and_leave\n"
        "def main(): raise TrainingFailed('so it is', hint='this helps')\n"
        "run_and_leave(main)"
    )
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=full, check=False, timeout=600)
    assert done.returncode == 12


def test_an_error_file_that_cannot_be_written_does_not_take_the_place_of_the_error() -> None:
    program = (
        "from janus_cluster.errors import TrainingFailed\n"
        "from janus_cluster.training.world import error_recorded, run_and_leave\n"
        "@error_recorded\n"
        "def main(): raise TrainingFailed('so it is')\n"
        "run_and_leave(main)"
    )
    environ = os.environ | {"TORCHELASTIC_ERROR_FILE": "/no/such/folder/error.json"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=False, timeout=600
    )
    assert (done.returncode, done.stderr.rstrip().split("\n")[-1]) == (
        12,
        "janus_cluster.errors.TrainingFailed: so it is",
    )
    assert "/no/such/folder" not in done.stderr
