"""submitit, extended: it sends the very script that lies in the run folder, and keeps its own record beside it."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from janus_cluster.errors import SlurmUnavailable, SubmitFailed
from janus_cluster.render.sbatch_names import OWNED
from janus_cluster.render.sbatch_options import REPLACES
from janus_cluster.rundir import RunDir
from janus_cluster.sandbox.state import client_env
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

# The SLURM_ variables that are about the client and not about the job in which the shell stands.
_OF_THE_CLIENT = frozenset({"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_UMASK"})
# SBATCH_ variables that are not called like their option. Source: sbatch(1), input environment variables.
_OPTION_OF = {
    "ARRAY_INX": "array", "DEBUG": "verbose", "MEM_PER_NODE": "mem", "REQ_SWITCH": "switches", "TIMELIMIT": "time",
    "WAIT4SWITCH": "switches",
}  # fmt: skip
# sbatch takes one of them.
_MEMORY = frozenset({"mem", "mem-per-cpu", "mem-per-gpu"})


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
        said = string if isinstance(string, str) else string.decode(errors="replace")
        # submitit takes the first "job <number>" of whatever a site's own sbatch may print before.
        found = re.search(r"^Submitted batch job (\d+)", said, re.MULTILINE)
        self.accepted_job_id = found[1] if found else str(super()._get_job_id_from_submission_command(said))
        return self.accepted_job_id

    def _num_tasks(self) -> int:
        return 1


def sbatch_command(run: RunDir, options: Sequence[str] = ()) -> list[str]:
    """The argv that submits the run; typing it by hand does the same. `options` win over the script's own."""
    return ["sbatch", *options, str(run.job_sbatch)]


def require_slurm(slurm_conf: Path | None = None) -> None:
    """sbatch and srun are on PATH, or are the sandbox's own. Raises: SlurmUnavailable naming both ways out."""
    path = client_env(slurm_conf).get("PATH") if slurm_conf else None
    missing = [program for program in ("sbatch", "srun") if shutil.which(program, path=path) is None]
    if missing:
        raise SlurmUnavailable(
            f"there is no Slurm on this machine: {' and '.join(missing)} not on PATH",
            hint=f"{WAYS_OUT}; --dry-run needs neither",
        )


def submit_run(run: RunDir, *, slurm_conf: Path | None, options: Sequence[str] = ()) -> str:
    """The job is queued. Returns: its job id. Raises: SubmitFailed with sbatch's own words."""
    said = io.StringIO()
    script = run.job_sbatch.read_text(encoding="utf-8")
    drop = {*left_by_another_job(os.environ)}
    for name in overriding(os.environ, script):
        print(f"{name} of this shell is left aside: sbatch would prefer it to job.sbatch", file=sys.stderr)
        drop.add(name)
    environ = {name: value for name, value in os.environ.items() if name not in drop}
    if slurm_conf is not None:
        environ |= client_env(slurm_conf)
    with _environ(environ):
        # It looks for srun at once.
        executor = BundleExecutor(run, options)
    try:
        with _environ(environ), contextlib.redirect_stderr(said):
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


def left_by_another_job(environ: Mapping[str, str]) -> list[str]:
    """The variables that describe the job in which this shell runs, if it does.

    sbatch carries SLURM_ variables into the new job even with --export=NONE, where its srun takes them for its own:
    SLURM_CPU_BIND of an interactive job would bind all ranks to the few cores of that one.
    """
    if "SLURM_JOB_ID" not in environ and "SLURM_JOBID" not in environ:
        return []
    return sorted(name for name in environ if name.startswith("SLURM_") and name not in _OF_THE_CLIENT)


def overriding(environ: Mapping[str, str], script: str) -> list[str]:
    """The SBATCH_ variables that say otherwise than the script, or what no job of ours may say.

    sbatch prefers a variable to the script's own line; what only adds to the script (SBATCH_ACCOUNT, …) is the user's.
    """
    given = set(re.findall(r"^#SBATCH --([a-z-]+)", script, re.MULTILINE))
    taken = given | set(OWNED) | {REPLACES[name] for name in given if name in REPLACES}
    taken |= {name for name, default in REPLACES.items() if default in given}
    taken |= _MEMORY if given & _MEMORY else frozenset()
    options = {name: name.removeprefix("SBATCH_") for name in sorted(environ) if name.startswith("SBATCH_")}
    return [name for name, rest in options.items() if _OPTION_OF.get(rest, rest.lower().replace("_", "-")) in taken]


@contextlib.contextmanager
def _environ(environ: Mapping[str, str]) -> Iterator[None]:
    """This process's environment is `environ`, for its children; submitit passes it on."""
    before = dict(os.environ)
    _replace_environ(environ)
    try:
        yield
    finally:
        _replace_environ(before)


def _replace_environ(environ: Mapping[str, str]) -> None:
    for name in [name for name in os.environ if name not in environ]:
        del os.environ[name]
    os.environ.update(environ)
