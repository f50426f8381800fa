"""submitit, extended: it sends the very script that lies in the run folder, and keeps its own record beside it."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from janus_cluster.errors import SlurmUnavailable, SubmitFailed
from janus_cluster.rundir import RunDir
from janus_cluster.slurm.commands import WAYS_OUT

# A terminal's Ctrl-C goes to all processes of its session in the foreground; an sbatch that is ended between the
# controller's acceptance and its answer would leave a job that nobody knows of. (At many sites sbatch is a script, and
# dash clears the signal mask that it inherits.)
_IN_A_SESSION_OF_ITS_OWN = (
    "import os, signal, sys\n"
    "os.setsid()\n"
    "signal.pthread_sigmask(signal.SIG_SETMASK, ())\n"
    "os.execvp(sys.argv[1], sys.argv[1:])\n"
)


@dataclass(frozen=True)
class RunAttempt:
    """What submitit records as the submitted function: the attempt that job.sbatch starts."""

    run_dir: str

    def __call__(self) -> int:
        from janus_cluster.config.schema import ResolvedJob
        from janus_cluster.node.attempt import build_launcher, run_job

        run = RunDir(Path(self.run_dir))
        resolved = ResolvedJob.load(run.resolved_json.read_text(encoding="utf-8"))
        return run_job(run, build_launcher("slurm", resolved, os.environ))


class BundleExecutor(submitit.SlurmExecutor):  # type: ignore[misc]
    """A SlurmExecutor whose script is the rendered job.sbatch, byte for byte.

    submitit renders a script around a pickle that waits for the job id; ours must also run when somebody types
    `sbatch job.sbatch`, so only the text and the path of the script are replaced.
    """

    def __init__(self, run: RunDir, options: Sequence[str] = ()) -> None:
        super().__init__(folder=run.submitit)
        self._run = run
        self._options = tuple(options)
        # Known from sbatch's answer on: what submitit does afterwards may fail, and the job is queued all the same.
        self.accepted_job_id: str | None = None

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self._run.job_sbatch.read_text(encoding="utf-8")

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return [sys.executable, "-I", "-S", "-c", _IN_A_SESSION_OF_ITS_OWN, *sbatch_command(self._run, self._options)]

    def _get_job_id_from_submission_command(self, string: bytes | str) -> str:
        self.accepted_job_id = str(super()._get_job_id_from_submission_command(string))
        return self.accepted_job_id

    def _num_tasks(self) -> int:
        return 1


def sbatch_command(run: RunDir, options: Sequence[str] = ()) -> list[str]:
    """The argv that submits the run; typing it by hand does the same. `options` win over the script's own."""
    return ["sbatch", *options, str(run.job_sbatch)]


def require_slurm() -> None:
    """sbatch and srun are on PATH. Raises: SlurmUnavailable naming both ways out."""
    missing = [program for program in ("sbatch", "srun") if shutil.which(program) is None]
    if missing:
        raise SlurmUnavailable(
            f"there is no Slurm on this machine: {' and '.join(missing)} not on PATH",
            hint=f"{WAYS_OUT}; --dry-run needs neither",
        )


def submit_run(run: RunDir, *, slurm_conf: Path | None, options: Sequence[str] = ()) -> str:
    """The job is queued. Returns: its job id. Raises: SubmitFailed with sbatch's own words."""
    said = io.StringIO()
    executor = BundleExecutor(run, options)
    try:
        with _slurm_conf(slurm_conf), contextlib.redirect_stderr(said):
            job = executor.submit(RunAttempt(str(run.path)))
    except OSError:
        if executor.accepted_job_id is None:
            raise
        return executor.accepted_job_id
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
