"""Caches of what libraries compile: on this node's own disk, not in a home folder that every node mounts.

In a shared home the ranks of all nodes would wait for each other's lock files, and triton would read a network file
per kernel.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from janus_cluster.job.resolved import EnvVar

_WANTED = {
    "TRITON_CACHE_DIR": ("triton", "Kernels of triton; ~/.triton without it."),
    "TORCHINDUCTOR_CACHE_DIR": ("inductor", "Output of torch.compile."),
    "TORCH_EXTENSIONS_DIR": ("torch_extensions", "What DeepSpeed compiles; ~/.cache without it."),
}


def cache_variables(environ: Mapping[str, str]) -> list[EnvVar]:
    """Variables for a private folder under $TMPDIR or /tmp, which is created; a value set by the user is kept.

    None where no such folder can be made: the libraries' defaults apply.
    """
    folder = Path(environ.get("TMPDIR") or "/tmp") / f"janus-cluster-{os.getuid()}"
    wanted = {name: value for name, value in _WANTED.items() if name not in environ}
    if not wanted or not _is_made_private(folder):
        return []
    return [
        EnvVar(name=name, value=str(folder / below), reason=reason, origin="this node's own disk")
        for name, (below, reason) in wanted.items()
    ]


def _is_made_private(folder: Path) -> bool:
    """True if `folder` exists and no other user can write into it: compiled code is run from it."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
