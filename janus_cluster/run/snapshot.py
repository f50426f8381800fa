"""The package as files: what a run folder keeps of it, and a sha256 that is equal for equal code.

The names are those of a wheel for every kind of installation: a checkout's templates/ are under _data/.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath

from janus_cluster.job.resources import templates_dir

PACKAGE = Path(__file__).resolve().parent.parent
_TEMPLATES = "_data/templates"
# Job files are read before submission only; templates are added under their name in a wheel.
_LEFT_OUT = frozenset({"__pycache__", "_data"})


def read_package() -> dict[str, bytes]:
    """Every file that a node needs of the package this process runs from, by its name inside the package."""
    files = {name: path.read_bytes() for name, path in _walk(PACKAGE)}
    files |= {f"{_TEMPLATES}/{name}": path.read_bytes() for name, path in _walk(templates_dir())}
    return dict(sorted(files.items()))


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    # os.walk is three times as fast as Path.rglob, and submit waits for this.
    for folder, below, names in os.walk(root):
        prefix = os.path.relpath(folder, root)
        prefix = "" if prefix == "." else f"{prefix}/"
        below[:] = [name for name in below if name not in _LEFT_OUT]
        for name in names:
            # What editors leave beside a file is no code; its coming and going changes nothing.
            if not name.startswith(".") and not name.endswith((".pyc", "~")):
                yield f"{prefix}{name}", Path(folder, name)


def hash_package(files: Mapping[str, bytes]) -> str:
    """sha256 over names and contents, in the order of names."""
    whole = hashlib.sha256()
    for name, digest in hash_files(files).items():
        whole.update(f"{name}\0{digest}\n".encode(errors="surrogateescape"))
    return whole.hexdigest()


def hash_files(files: Mapping[str, bytes]) -> dict[str, str]:
    """sha256 of each file, in the order of names."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}


def write_package(files: Mapping[str, bytes], folder: Path) -> None:
    """`folder`/janus_cluster holds the files and can be imported from `folder`. Raises: OSError.

    They are copies: an editor that writes into the installed file would write into a hard link, too. Nothing is synced
    to the disk one by one, which would take longer than all the rest of a submission.
    """
    package = folder / PACKAGE.name
    # Each level by its own: mkdir(parents=True) would give the mode to the last one only.
    for parent in [folder, *sorted({package / above for name in files for above in PurePath(name).parents})]:
        parent.mkdir(mode=0o700)
    for name, data in files.items():
        fd = os.open(f"{package}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            if os.write(fd, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{package}/{name}")
        finally:
            os.close(fd)
