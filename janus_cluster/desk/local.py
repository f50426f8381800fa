"""Start a run on this machine: the same job.sbatch, as a background process in its own session."""

from __future__ import annotations

import os
import shutil

from janus_cluster.errors import JanusError
from janus_cluster.run.paths import BundleDir, RunDir


def local_command(bundle: BundleDir) -> list[str]:
    """The argv that runs the job here; typing it with JANUS_LAUNCHER=local does the same."""
    return ["bash", str(bundle.job_sbatch)]


def submit_local(run: RunDir, bundle: BundleDir) -> str:
    """Start the job in the background; it survives this terminal. Returns: job id `local-<pid>`."""
    bash = shutil.which("bash")
    if bash is None:
        raise JanusError("bash is not on PATH; job.sbatch is a bash script")
    run.logs.mkdir(parents=True, exist_ok=True)
    log = os.open(run.batch_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    try:
        pid = os.posix_spawn(
            bash,
            local_command(bundle),
            os.environ | {"JANUS_LAUNCHER": "local"},
            file_actions=[(os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)],
            setsid=True,
            # Submitting blocks signals meanwhile; the job must not inherit that.
            setsigmask=[],
        )
    finally:
        os.close(log)
        os.close(null)
    return f"local-{pid}"
