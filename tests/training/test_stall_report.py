"""What two real ranks write about the collective that one of them never joins, with and without a flight recorder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from janus_cluster.diagnosis.stall import judge_stall, load_stalls
from janus_cluster.run.paths import RunDir

pytestmark = pytest.mark.train

RANKS = """
import os, sys, threading, time
from pathlib import Path
import torch, torch.distributed as dist
from janus_cluster.run.paths import RunDir
from janus_cluster.training.stall import StallReport

dist.init_process_group("gloo")
rank = dist.get_rank()
run = RunDir(Path(sys.argv[1]))

def look():
    time.sleep(2)
    StallReport(run, attempt=1, rank=rank, node=f"n{rank}").write(doing="step", step=4, count=7)
    while not all(run.stall_json(1, r).exists() for r in (0, 1)):
        time.sleep(0.1)
    # Rank 0 first: its all-reduce would fail for the loss of rank 1.
    time.sleep(3 * rank)
    os._exit(0)

dist.all_reduce(torch.ones(1))
pair = dist.new_group([0, 1])
dist.broadcast(torch.ones(1), src=0, group=pair)
threading.Thread(target=look, daemon=True).start()
if rank == 1:
    time.sleep(600)
dist.all_reduce(torch.ones(3))
"""


def stop_apart(folder: Path, *, buffer: str) -> dict[int, dict[str, Any]]:
    """Rank 0 is in an all-reduce of 3 numbers, rank 1 asleep; both wrote their file."""
    (folder / "ranks.py").write_text(RANKS)
    RunDir(folder).attempt_logs(1).mkdir(parents=True)
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    environ = os.environ | {"TORCH_FR_BUFFER_SIZE": buffer}
    argv += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", str(folder / "ranks.py"), str(folder)]
    done = subprocess.run(
        argv, env=environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    run = RunDir(folder)
    return {rank: json.loads(run.stall_json(1, rank).read_text()) for rank in (0, 1)}


def test_the_flight_recorder_has_which_collective_the_rank_waits_in(tmp_path: Path) -> None:
    from torch._C import _distributed_c10d

    if not hasattr(_distributed_c10d, "_dump_fr_trace"):
        pytest.skip("gloo has no flight recorder in this torch")
    found = stop_apart(tmp_path, buffer="100")
    world, pair = found[0]["groups"]
    waits_in = world["waits_in"]
    assert (world["ranks"], pair["ranks"], pair["waits_in"]) == ([0, 1], [0, 1], None)
    assert (waits_in["name"], waits_in["sizes"], waits_in["number"]) == ("all_reduce", [[3]], world["last_number"])
    assert found[1]["groups"][0]["waits_in"] is None
    assert any("all_reduce" in frame for frame in found[0]["frames"])
    assert any("time.sleep(600)" in frame for frame in found[1]["frames"])
    stall = judge_stall(load_stalls(RunDir(tmp_path), attempt=1, world_size=2), world_size=2)
    assert stall is not None and stall.missing == (1,)
    assert RunDir(tmp_path).stall_trace(1, 0).stat().st_size > 0


def test_without_a_recorder_the_stack_names_the_collective(tmp_path: Path) -> None:
    found = stop_apart(tmp_path, buffer="0")
    (world,) = found[0]["groups"]
    assert world["waits_in"]["name"] == "all_reduce"
    assert found[1]["groups"] == []
    assert not RunDir(tmp_path).stall_trace(1, 0).exists()
    stall = judge_stall(load_stalls(RunDir(tmp_path), attempt=1, world_size=2), world_size=2)
    assert stall is not None and stall.missing == (1,)
    assert stall.message.startswith("rank 1 on n1 did not join all_reduce")
