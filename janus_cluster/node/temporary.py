"""A private temporary folder for a node's ranks, where $TMPDIR has too long a path for sockets or is noexec."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from janus_cluster.job.resolved import EnvVar
from janus_cluster.preflight.temporary import choose_temporary, describe_faults, read_temporary

# Short: a socket's whole path has 107 bytes, of which multiprocessing takes 32.
_PREFIX = "janus-"


def make_private_folder(environ: Mapping[str, str]) -> EnvVar | None:
    """TMPDIR for the ranks: a new folder of mode 0700 that the caller removes; None where none is needed."""
    tried = read_temporary(environ)
    own, chosen = tried[0], choose_temporary(tried)
    if chosen is None or chosen is own:
        return None
    folder = tempfile.mkdtemp(prefix=_PREFIX, dir=chosen["path"])
    reason = f"{own['path']}: {describe_faults(own)}; private, removed at the end."
    return EnvVar(name="TMPDIR", value=folder, reason=reason, origin="this node's temporary folder")


def remove_private_folder(variable: EnvVar) -> None:
    """Remove the folder, as far as possible."""
    shutil.rmtree(Path(variable.value), ignore_errors=True)
