"""Read the job's weights into the page cache once per node, while Python, torch and the index start up.

    python -m janus_cluster.node.read_ahead PARENT_PID FILE …

The ranks of a node map the files: what is in the page cache by then is read at memory speed. The rest is read in the
order in which tensors are used, a page fault at a time, by every rank at once.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.modelspec.safetensors_header import CheckpointProblem, find_weight_files
from janus_cluster.modelspec.vggt_source import VGGT_FILE
from janus_cluster.run.parent import end_with_parent

_CHUNK_BYTES = 16 << 20
# One reader of a network file system gets only a part of its bandwidth.
_FILES_AT_ONCE = 4


def start_read_ahead(resolved: ResolvedJob, *, node_rank: int) -> subprocess.Popen[bytes] | None:
    """Start a process that reads the weights of this node's ranks; it ends when done, or with the calling process.

    Returns: that process; None where there is nothing to read, or no room for it.
    """
    files = select_files(resolved, node_rank=node_rank)
    if not files or sum(path.stat().st_size for path in files) > _free_memory_bytes() / 2:
        return None
    argv = [sys.executable, "-m", "janus_cluster.node.read_ahead", str(os.getpid()), *map(str, files)]
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def select_files(resolved: ResolvedJob, *, node_rank: int) -> list[Path]:
    """Weight files that this node's ranks will map, without those that cannot be found: loading reports them.

    Under ZeRO-3 rank 0 reads the model for all; every rank reads VGGT.
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


def _free_memory_bytes() -> int:
    """Memory that is available without taking it from other processes."""
    import psutil

    return int(psutil.virtual_memory().available)


def read_files(files: Iterable[Path]) -> int:
    """Read every byte of the files into the page cache, as long as there is room. Returns: how many were read."""
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        return sum(pool.map(_read, files))


def _read(path: Path) -> int:
    buffer, offset = bytearray(_CHUNK_BYTES), 0
    # Loading meets the same error and reports it.
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY)
        try:
            while count := os.preadv(fd, [buffer], offset):
                offset += count
        finally:
            os.close(fd)
    return offset


def main(argv: Sequence[str]) -> None:
    """argv[0] is the pid of the calling process."""
    parent, *files = argv
    if end_with_parent(int(parent)):
        read_files(map(Path, files))


if __name__ == "__main__":
    main(sys.argv[1:])
