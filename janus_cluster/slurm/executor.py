"""submitit, extended: it sends the very script that lies in the run folder, and keeps its own record beside it."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from janus_cluster.errors import SlurmUnavailable, SubmitFailed
from janus_cluster.rundir import RunDir
from janus_cluster.slurm.commands import WAYS_OUT


@dataclass(frozen=True)
class RunAttempt:
    """What submitit records as the submitted function: the attempt that job.sbatch starts."""

    run_dir: str

    def __call__(self) -> int:
        from janus_cluster.config.schema import ResolvedJob
        from janus_cluster.node.attempt import build_launcher, run_attempt

        run = RunDir(Path(self.run_dir))
        resolved = ResolvedJob.load(run.resolved_json.read_text(encoding="utf-8"))
        return run_attempt(run, build_launcher("slurm", resolved, os.environ))


class BundleExecutor(submitit.SlurmExecutor):  # type: ignore[misc]
    """A SlurmExecutor whose script is the rendered job.sbatch, byte for byte.

    submitit renders a script around a pickle that waits for the job id; ours must also run when somebody types
    `sbatch job.sbatch`, so only the text and the path of the script are replaced.
    """

    def __init__(self, run: RunDir) -> None:
        super().__init__(folder=run.submitit)
        self._run = run

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self._run.job_sbatch.read_text(encoding="utf-8")

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return sbatch_command(self._run)

    def _num_tasks(self) -> int:
        return 1


def sbatch_command(run: RunDir) -> list[str]:
    """The argv that submits the run; typing it by hand does the same."""
    return ["sbatch", str(run.job_sbatch)]


def require_slurm() -> None:
    """sbatch and srun are on PATH. Raises: SlurmUnavailable naming both ways out."""
    missing = [program for program in ("sbatch", "srun") if shutil.which(program) is None]
    if missing:
        raise SlurmUnavailable(
            f"there is no Slurm on this machine: {' and '.join(missing)} not on PATH",
            hint=f"{WAYS_OUT}; --dry-run needs neither",
        )


def submit_run(run: RunDir, *, slurm_conf: Path | None) -> str:
    """The job is queued. Returns: its job id. Raises: SubmitFailed with sbatch's own words."""
    said = io.StringIO()
    try:
        with _slurm_conf(slurm_conf), contextlib.redirect_stderr(said):
            job = BundleExecutor(run).submit(RunAttempt(str(run.path)))
    except (FailedJobError, FailedSubmissionError) as e:
        words = str(e).strip() or said.getvalue().strip()
        raise SubmitFailed(
            f"sbatch refused the job:\n    {words}",
            hint="mend the keys under `slurm:` in the job file, or use --set slurm.…",
        ) from e
    return str(job.job_id)


@contextlib.contextmanager
def _slurm_conf(conf: Path | None) -> Iterator[None]:
    """SLURM_CONF points at `conf` for the children of this process; submitit passes the environment on."""
    if conf is None:
        yield
        return
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(conf)
    try:
        yield
    finally:
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before
