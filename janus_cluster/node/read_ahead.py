"""The job's weights come from the disk once per node, while Python, torch and the index take their time.

    python -m janus_cluster.node.read_ahead PARENT_PID FILE …

The ranks of a node map the files, so whatever lies in the page cache by then costs them memory speed. A mapped file
that does not is read in the order in which tensors are asked for, a page fault at a time, by every rank at once.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from janus_cluster.config.safetensors_header import CheckpointProblem, find_weight_files
from janus_cluster.config.schema import ResolvedJob
from janus_cluster.config.vggt_source import VGGT_FILE
from janus_cluster.node.child import end_with_parent

_CHUNK_BYTES = 16 << 20
# A network file system gives one reader a part of what it has.
_FILES_AT_ONCE = 4


def start_read_ahead(resolved: ResolvedJob, *, node_rank: int) -> subprocess.Popen[bytes] | None:
    """A process reads the weights of this node's ranks, and ends by itself, or with the process that called this.

    Returns: that process; None where there is nothing to read, or no room for it.
    """
    files = select_files(resolved, node_rank=node_rank)
    if not files or sum(path.stat().st_size for path in files) > free_memory_bytes() / 2:
        return None
    argv = [sys.executable, "-m", "janus_cluster.node.read_ahead", str(os.getpid()), *map(str, files)]
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def select_files(resolved: ResolvedJob, *, node_rank: int) -> list[Path]:
    """Weight files that ranks of this node will map; none that cannot be found, of which loading will tell.

    Under ZeRO-3 rank 0 reads the model for all; VGGT lies on every rank.
    """
    model = resolved.job.model
    stage = resolved.ds_config.get("zero_optimization", {}).get("stage", 0)
    found: list[Path] = []
    if model.path is not None and (stage != 3 or node_rank == 0):
        found += _files_of(Path(model.path))
    if model.vggt_path is not None:
        found += _files_of(Path(model.vggt_path), any_name=True)
    elif model.path is not None and Path(model.path, VGGT_FILE).is_file():
        found.append(Path(model.path, VGGT_FILE))
    return found


def _files_of(path: Path, *, any_name: bool = False) -> list[Path]:
    try:
        return find_weight_files(path, any_name=any_name)
    except (CheckpointProblem, OSError):
        return []


def free_memory_bytes() -> int:
    """What the node could still give without taking from anybody; 0 where it is not known."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def read_files(files: Iterable[Path]) -> int:
    """Every byte of the files is in the page cache, as long as there is room. Returns: how many were read."""
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        return sum(pool.map(_read, files))


def _read(path: Path) -> int:
    buffer, offset = bytearray(_CHUNK_BYTES), 0
    # Whatever is wrong with a file, loading meets it too, and says so.
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY)
        try:
            while count := os.preadv(fd, [buffer], offset):
                offset += count
        finally:
            os.close(fd)
    return offset


def main(argv: Sequence[str]) -> None:
    """argv[0] is the pid of the process that asked for it."""
    parent, *files = argv
    if end_with_parent(int(parent)):
        read_files(map(Path, files))


if __name__ == "__main__":
    main(sys.argv[1:])
