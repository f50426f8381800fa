"""Real loader processes that cannot hand over a batch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from janus_cluster.training.data.loader import WORKER_SAYS

pytestmark = pytest.mark.train

PROGRAM = """
import os, signal, sys, time
import torch
from torch.utils.data import Dataset, default_collate
from janus_cluster.training.data.loader import build_loader

class Frames(Dataset):
    def __getitem__(self, index):
        if sys.argv[1] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[1] == "stuck" and torch.utils.data.get_worker_info():
            time.sleep(60)
        return {"frames": torch.zeros(100, 100)}

began_s = time.monotonic()
sys.excepthook = lambda *error: (sys.__excepthook__(*error), print(f"after {time.monotonic() - began_s:.0f} s"))
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


def test_a_temporary_folder_too_long_for_a_socket_ends_the_rank_with_the_workers_words(tmp_path: Path) -> None:
    too_long = tmp_path / ("x" * 100)
    too_long.mkdir()
    code, out, said = load("send", tmpdir=too_long)
    assert code == 1 and "batch" not in out
    assert f"\n{WORKER_SAYS}OSError: AF_UNIX path too long\n" in said
    assert "RuntimeError: DataLoader worker (pid" in said
    assert load("send", tmpdir=too_long, num_workers=0)[:2] == (0, "batch 2 100 100\n"), "what the card says to do"


def test_a_killed_worker_ends_the_rank(tmp_path: Path) -> None:
    code, _, said = load("killed", tmpdir=Path("/tmp"))
    assert code == 1 and "is killed by signal: Killed" in said


def test_a_worker_that_delivers_nothing_ends_the_rank(tmp_path: Path) -> None:
    code, _, said = load("stuck", tmpdir=Path("/tmp"))
    assert code == 1 and "DataLoader timed out after 3 seconds" in said
