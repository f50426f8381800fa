"""Real loader processes that cannot hand over a batch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.train

PROGRAM = """
import multiprocessing, os, signal, sys, time
import torch
from torch.utils.data import Dataset, default_collate
from janus_cluster.janusvln.data.loader import build_loader, stuck_workers_named

def wait_for_the_file_server():
    time.sleep(60)

class Frames(Dataset):
    def __getitem__(self, index):
        if sys.argv[1] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[1] == "stuck" and torch.utils.data.get_worker_info():
            wait_for_the_file_server()
        if sys.argv[1] == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        return {"frames": torch.zeros(100, 100)}

began_s = time.monotonic()

def show(kind, error, trace):
    sys.__excepthook__(kind, error, trace)
    print("kind", getattr(error, "kind", None))
    print(f"after {time.monotonic() - began_s:.0f} s", flush=True)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
    # As a rank leaves: without a wait for processes that may never end.
    os._exit(1)

sys.excepthook = show
with stuck_workers_named():
    for batch in build_loader(Frames(), batches=[[0, 1]], collate=default_collate, num_workers=int(sys.argv[2]),
                              pin_memory=False, timeout_s=3):
        print("batch", *batch["frames"].shape)
"""


def load(what: str, *, num_workers: int = 1, tmpdir: Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a process that asks for one batch; an error comes within a minute of that."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, what, str(num_workers)],
        env=os.environ | {"TMPDIR": str(tmpdir)}, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    if late := re.search(r"^after (\d+) s$", done.stdout, re.MULTILINE):
        assert int(late[1]) < 60
    return done.returncode, done.stdout, done.stderr


def test_a_batch_that_cannot_be_sent_is_an_error_of_the_rank_with_its_class(tmp_path: Path) -> None:
    too_long = tmp_path / ("x" * 100)
    too_long.mkdir()
    code, out, output = load("send", tmpdir=too_long)
    assert code == 1 and out.startswith("kind loader\n")
    assert "could not hand over a batch: OSError: AF_UNIX path too long\n" in output
    assert load("send", tmpdir=too_long, num_workers=0)[:2] == (0, "batch 2 100 100\n"), "the card's advice"


def test_a_killed_worker_ends_the_rank(tmp_path: Path) -> None:
    code, _, output = load("killed", tmpdir=Path("/tmp"))
    assert code == 1 and "is killed by signal: Killed" in output


def test_a_worker_that_delivers_nothing_ends_the_rank_which_names_its_place() -> None:
    code, out, output = load("stuck", tmpdir=Path("/tmp"), num_workers=2)
    assert code == 1 and out.startswith("kind loader\n")
    place = r"DataLoader timed out after 3 seconds: worker \d+ is in wait_for_the_file_server \(<string>:\d+\)"
    assert re.search(place + r" of __getitem__ \(<string>:\d+\)$", output, re.MULTILINE), "the other worker waits"


def test_a_worker_that_answers_nothing_is_named_with_its_state() -> None:
    code, _, output = load("stopped", tmpdir=Path("/tmp"))
    assert code == 1
    assert re.search(r"timed out after 3 seconds: worker \d+ does not answer \(state T\)$", output, re.MULTILINE)
