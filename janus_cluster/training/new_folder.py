"""A folder of files for others to read, whole or not there at all."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Write into what this yields; after the block `folder` is that, and after an error what it was before."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield temporary
        _make_readable(temporary)
        _replace(folder, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _make_readable(folder: Path) -> None:
    """Others may read the export: mkdtemp and safetensors make what they write private."""
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)


def _replace(folder: Path, new: Path) -> None:
    """`folder` is what `new` was; a folder cannot be renamed over a full one, so the old one steps aside first."""
    old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old."))
    if folder.exists():
        folder.rename(old / "was")
    new.rename(folder)
    # What another process still reads, NFS keeps as .nfsXXXX: no reason for a finished run to fail.
    shutil.rmtree(old, ignore_errors=True)
