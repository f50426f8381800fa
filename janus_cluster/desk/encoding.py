"""The script of a job is UTF-8: a path must have the same bytes there as on this machine."""

from __future__ import annotations

import sys

from janus_cluster.errors import UsageError
from janus_cluster.job.resolved import ResolvedJob


def require_same_bytes(resolved: ResolvedJob, *, encoding: str | None = None) -> None:
    """Require that each path of the job is written into the script as it is on the disk.

    `encoding`: how this process decoded it; default: the shell's. Raises: UsageError naming the paths.
    """
    job, shell = resolved.job, encoding or sys.getfilesystemencoding()
    paths = [("run folder", resolved.run_dir), ("environment.python", resolved.python)]
    paths += [("model.path", job.model.path or ""), ("model.vggt_path", job.model.vggt_path or "")]
    paths += [("data.roots", root.path) for root in job.data.roots]
    problems = [f"{key}: {path!r}" for key, path in paths if _bytes(path, shell) != _bytes(path, "utf-8")]
    if problems:
        raise UsageError.of_many(
            [
                f"{problem} has other bytes in UTF-8, which the nodes use, than in this shell ({shell})"
                for problem in problems
            ],
            hint="export LC_ALL=C.UTF-8, then submit again; a folder whose name is not UTF-8 must be renamed",
        )


def _bytes(path: str, encoding: str) -> bytes | None:
    try:
        # As Python keeps bytes that it cannot decode.
        return path.encode(encoding, "surrogateescape")
    except UnicodeEncodeError:
        return None
