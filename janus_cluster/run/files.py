"""Small files in a run folder: atomic writes, and reading JSON."""

from __future__ import annotations

import errno
import json
import os
import secrets
import tempfile
from pathlib import Path
from typing import Any


def write_text_atomically(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Write `path` in one step: it holds all of `text` or what it held before; readers never see a part."""
    write_bytes_atomically(path, text.encode("utf-8"), mode=mode)


def write_bytes_atomically(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write `path` in one step: it holds all of `data` or what it held before; readers never see a part."""
    fd, tmp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as f:
            os.fchmod(f.fileno(), mode)
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        Path(tmp).replace(path)
    except BaseException as e:
        Path(tmp).unlink(missing_ok=True)
        if isinstance(e, OSError) and e.filename is None:
            # A full disk is met in write, where Python does not know the name.
            e.filename = str(path)
        raise


def append_line(path: Path, text: str) -> None:
    """`path` has `text` as one whole line more. Raises: OSError."""
    line = text.encode("utf-8") + b"\n"
    with path.open("ab+") as f:
        # What a crash, or a full disk, left of a line must not spoil this one too.
        if f.seek(0, os.SEEK_END):
            f.seek(-1, os.SEEK_END)
            line = line if f.read(1) == b"\n" else b"\n" + line
        f.write(line)


def write_json_atomically(path: Path, value: Any) -> None:
    """`path` holds `value` as indented JSON, or what it held before."""
    write_text_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def replace_link_atomically(path: Path, target: Path) -> None:
    """`path` is a symbolic link to `target`, which is relative to its folder; it exists at every moment."""
    if path.is_symlink() and path.readlink() == target:
        return
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    new.symlink_to(target)
    try:
        new.replace(path)
    except BaseException:
        new.unlink()
        raise


def name_of_trouble(error: OSError) -> str:
    """`ENOSPC`: for logs of errors that were survived; the system's message would be taken for the cause of an end."""
    return errno.errorcode.get(error.errno or 0, type(error).__name__)


def read_json(path: Path) -> Any:
    """The file's JSON value. Raises: OSError, ValueError."""
    return json.loads(path.read_text(encoding="utf-8"))
