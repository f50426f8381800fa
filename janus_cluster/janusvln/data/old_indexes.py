"""Remove indexes that were not used for a month from the folder where they are kept."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

# Longer than a job may run, and each of its attempts marks its index anew: no process maps what is removed.
UNUSED_DAYS = 30
KEPT_AT_LEAST = 5
SECONDS_PER_DAY = 86_400
# As indexing.py names them: the data set and how it was checked, then what it looked like.
INDEX_NAME = re.compile(r"^[0-9a-f]{16}(-decoded)?-[0-9a-f]{16}$", re.ASCII)
LEFTOVER_PREFIXES = (".building-", ".removing-")  # of processes that were killed


def mark_used(folder: Path) -> None:
    """Mark the index as used now, where this user has the permission."""
    with suppress(OSError):
        os.utime(folder)


def remove_old_indexes(index_dir: Path) -> list[Path]:
    """Remove indexes that were not used for UNUSED_DAYS, but for the KEPT_AT_LEAST last used ones.

    Returns: what was removed. What cannot be removed is kept.
    """
    used_s: dict[Path, float] = {}
    leftovers = []
    with suppress(OSError):
        for path in index_dir.iterdir():
            if INDEX_NAME.match(path.name):
                with suppress(OSError):
                    used_s[path] = path.stat().st_mtime
            elif path.name.startswith(LEFTOVER_PREFIXES):
                leftovers.append(path)
    too_old_s = time.time() - UNUSED_DAYS * SECONDS_PER_DAY
    candidates = sorted(used_s, key=lambda path: used_s[path], reverse=True)[KEPT_AT_LEAST:]
    removed = [path for path in candidates if used_s[path] < too_old_s and _remove(path)]
    for path in leftovers:
        with suppress(OSError):
            if path.stat().st_mtime < too_old_s:
                shutil.rmtree(path, ignore_errors=True)
    return removed


def _remove(folder: Path) -> bool:
    """Remove the folder: renamed first, so that it is gone at once for every reader, then its files."""
    try:
        away = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".removing-"))
        folder.rename(away)
    except OSError:
        return False
    shutil.rmtree(away, ignore_errors=True)
    return True
