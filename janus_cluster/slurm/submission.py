"""submitit, extended: it sends the script of the run folder, and keeps its own record beside it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import submitit

from janus_cluster.errors import JanusError, LimitReached, MaybeQueued, SlurmUnavailable, SubmitFailed
from janus_cluster.job.sbatch_names import OWNED, VERSIONS
from janus_cluster.job.sbatch_options import REPLACES
from janus_cluster.run.paths import BundleDir
from janus_cluster.slurm.client_env import client_env
from janus_cluster.slurm.commands import WAYS_OUT, Slurm
from janus_cluster.slurm.sbatch_answer import Queued, Refusal, SbatchAnswer, may_arrive_later, read_answer
from janus_cluster.slurm.trouble import find_trouble, no_answer

# A terminal's Ctrl-C goes to all processes of its foreground session; an sbatch killed between the controller's
# acceptance and its answer would leave an unrecorded job. (At many sites sbatch is a script, and dash clears the signal
# mask that it inherits.) Its answer is passed on as JSON: submitit would take a foreign byte, or an exit code after
# the acceptance, for a failure.
_IN_A_SESSION_OF_ITS_OWN = """
import json, os, signal, subprocess, sys
os.setsid()
signal.pthread_sigmask(signal.SIG_SETMASK, ())
try:
    done = subprocess.run(sys.argv[1:], capture_output=True, encoding="utf-8", errors="replace")
    answer = [done.returncode, done.stdout, done.stderr]
except OSError as e:
    answer = [127, "", str(e)]
print(json.dumps(answer))
"""

# The SLURM_ variables that are about the client and not about the job in which the shell runs.
_OF_THE_CLIENT = frozenset({"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_UMASK"})
# SBATCH_ variables whose names differ from their option's. Source: sbatch(1), input environment variables.
_OPTION_OF = {
    "ARRAY_INX": "array", "BURST_BUFFER": "bb", "CPU_FREQ_REQ": "cpu-freq", "DEBUG": "verbose",
    "MEM_PER_NODE": "mem", "REQ_SWITCH": "switches", "SEGMENT_SIZE": "segment",
    "TIMELIMIT": "time",
    "WAIT4SWITCH": "switches",
}  # fmt: skip
_UNKNOWN_OPTION = re.compile(r"(?:unrecognized|unknown|invalid) option:? '?--([a-z-]+)")
_SEARCH_PAUSE_S = 5.0
# sbatch takes one of them.
_MEMORY = frozenset({"mem", "mem-per-cpu", "mem-per-gpu"})


class BundleExecutor(submitit.SlurmExecutor):  # type: ignore[misc]
    """A SlurmExecutor whose script is the rendered job.sbatch, byte for byte.

    submitit renders a script around a pickle that waits for the job id; ours must also run by a typed
    `sbatch job.sbatch`, so only the text and the path of the script are replaced.
    """

    def __init__(self, bundle: BundleDir, *, folder: Path, options: Sequence[str] = ()) -> None:
        super().__init__(folder=folder)
        self._bundle = bundle
        self._options = tuple(options)
        # Known from sbatch's answer on: a later failure of submitit's leaves the job queued.
        self.queued: Queued | None = None

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self._bundle.job_sbatch.read_text(encoding="utf-8")

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return [
            sys.executable,
            "-I",
            "-S",
            "-c",
            _IN_A_SESSION_OF_ITS_OWN,
            *sbatch_command(self._bundle, self._options),
        ]

    def _get_job_id_from_submission_command(self, string: bytes | str) -> str:
        text = string if isinstance(string, str) else string.decode()
        answer = SbatchAnswer(*json.loads(text.strip().rpartition("\n")[2]))
        result = read_answer(answer)
        if not isinstance(result, Queued):
            raise _NotQueued(answer, result)
        self.queued = result
        return result.job_id

    def _num_tasks(self) -> int:
        return 1


def sbatch_command(bundle: BundleDir, options: Sequence[str] = ()) -> list[str]:
    """The argv that submits the bundle by hand. `options` override the script's own."""
    return ["sbatch", *options, str(bundle.job_sbatch)]


def require_slurm(slurm_conf: Path | None = None) -> None:
    """sbatch and srun are on PATH, or are the sandbox's own. Raises: SlurmUnavailable naming both ways out."""
    path = client_env(slurm_conf).get("PATH") if slurm_conf else None
    missing = [program for program in ("sbatch", "srun") if shutil.which(program, path=path) is None]
    if missing:
        raise SlurmUnavailable(
            f"there is no Slurm on this machine: {' and '.join(missing)} not on PATH",
            hint=f"{WAYS_OUT}; --dry-run needs neither",
        )


def submit_run(
    bundle: BundleDir,
    function: Callable[[], int],
    *,
    folder: Path,
    slurm: Slurm,
    options: Sequence[str] = (),
    earlier: Collection[str] = (),
    patience_s: float,
) -> Queued:
    """Queue the job; submitit records in `folder` that job.sbatch runs `function`. `earlier`: the run's former job ids.

    Where sbatch's answer was lost the job is searched by its script, for `patience_s` at most.
    Raises: SubmitFailed or SlurmUnavailable with sbatch's message: nothing is queued. MaybeQueued: that is not known.
    """
    script = bundle.job_sbatch.read_text(encoding="utf-8")
    drop = {*left_by_another_job(os.environ)}
    for name in overriding(os.environ, script):
        print(f"{name} of this shell is not passed on: sbatch would prefer it to job.sbatch", file=sys.stderr)
        drop.add(name)
    environ = {name: value for name, value in slurm.environ().items() if name not in drop}
    with _environ(environ):
        # submitit looks for srun at once.
        executor = BundleExecutor(bundle, folder=folder, options=options)
    try:
        with _environ(environ), contextlib.redirect_stderr(io.StringIO()):
            executor.submit(function)
    except _NotQueued as e:
        if e.refusal is not None:
            raise _refused(e.refusal, e.answer) from e
        return _search(bundle, slurm, e.answer, earlier=earlier, patience_s=patience_s)
    except OSError:
        if executor.queued is None:
            raise
    if executor.queued is None:
        raise TypeError("submitit did not ask for the job id")
    return executor.queued


class _NotQueued(Exception):
    """sbatch gave no job id."""

    def __init__(self, answer: SbatchAnswer, refusal: Refusal | None) -> None:
        super().__init__(answer.message)
        self.answer = answer
        self.refusal = refusal


def _refused(refusal: Refusal, answer: SbatchAnswer) -> JanusError:
    if refusal.kind == "away":
        trouble = find_trouble(answer.message) or no_answer()
        return SlurmUnavailable(
            f"nothing was queued: Slurm did not take the job, {trouble.cause}:\n    {answer.message}",
            hint=trouble.remedy,
        )
    message = f"sbatch refused the job:\n    {answer.message}"
    if refusal.kind == "limit":
        return LimitReached(
            message,
            hint="a limit of your user, account or QOS: squeue --me shows your jobs, sacctmgr show qos the limits; "
            "wait, or use --set slurm.qos=… or slurm.account=…",
        )
    unknown = _UNKNOWN_OPTION.search(answer.message)
    first, gone = VERSIONS.get(unknown[1] if unknown else "", (None, None))
    versions = [f"from {first} on" if first else "", f"up to the last before {gone}" if gone else ""]
    when = f"Slurm has that option {' '.join(filter(None, versions))}: sbatch --version; " if first or gone else ""
    return SubmitFailed(message, hint=f"{when}correct the keys under `slurm:` in the job file, or use --set slurm.…")


def _search(
    bundle: BundleDir, slurm: Slurm, answer: SbatchAnswer, *, earlier: Collection[str], patience_s: float
) -> Queued:
    """The job that was queued although its answer was lost.

    Raises: SubmitFailed where the queue twice does not have it; MaybeQueued where it cannot be asked in time, or where
    the request may still arrive.
    """
    print(f"sbatch's answer is not clear ({answer.message}): searching the queue for the job", file=sys.stderr)
    deadline = time.monotonic() + patience_s
    absent = 0
    while True:
        try:
            job = slurm.find_job(bundle.job_sbatch, earlier=earlier)
        except JanusError as e:
            if time.monotonic() > deadline:
                # All that 22.05 answers to another munge key.
                is_deaf = "zero bytes" in f"{e.message} {answer.message}".lower()
                key = "; munge -n | ssh CONTROLLER unmunge   # do the munge keys and the clocks agree?"
                raise MaybeQueued(
                    f"the job may be queued: sbatch's answer was lost, and the queue cannot be searched ({e.message})\n"
                    f"    sbatch: {answer.message}",
                    hint=f"squeue --me -o '%i %T %o'   # the job with {bundle.job_sbatch}; scancel JOBID ends it"
                    + (key if is_deaf else ""),
                ) from e
        else:
            if job is not None:
                print(f"it is queued as job {job.job_id}", file=sys.stderr)
                return Queued(job.job_id)
            absent += 1
            if absent == 2 and may_arrive_later(answer):
                raise MaybeQueued(
                    "the job may be queued: sbatch's answer was lost; the queue has no such job yet, and the "
                    f"controller may take the request later\n    sbatch: {answer.message}",
                    hint=f"squeue --me -o '%i %T %o'   # the job with {bundle.job_sbatch}; scancel JOBID ends it",
                )
            if absent == 2:
                raise SubmitFailed(
                    f"sbatch failed, and the queue has no such job:\n    {answer.message}", hint="submit it again"
                )
        # A controller that was busy may take the request a moment after it answers again.
        time.sleep(_SEARCH_PAUSE_S)


def left_by_another_job(environ: Mapping[str, str]) -> list[str]:
    """The variables that describe the job in which this shell runs, if it does.

    sbatch carries SLURM_ variables into the new job even with --export=NONE, where its srun takes them for its own:
    SLURM_CPU_BIND of an interactive job would bind all ranks to the few cores of that one.
    """
    if "SLURM_JOB_ID" not in environ and "SLURM_JOBID" not in environ:
        return []
    return sorted(name for name in environ if name.startswith("SLURM_") and name not in _OF_THE_CLIENT)


def overriding(environ: Mapping[str, str], script: str) -> list[str]:
    """The SBATCH_ variables that contradict the script, or that no job of ours may have.

    sbatch prefers a variable to the script's own line; one that only adds to the script (SBATCH_ACCOUNT, …) is kept.
    """
    given = set(re.findall(r"^#SBATCH --([a-z-]+)", script, re.MULTILINE))
    taken = given | set(OWNED) | {REPLACES[name] for name in given if name in REPLACES}
    taken |= {name for name, default in REPLACES.items() if default in given}
    taken |= _MEMORY if given & _MEMORY else frozenset()
    options = {name: name.removeprefix("SBATCH_") for name in sorted(environ) if name.startswith("SBATCH_")}
    return [name for name, rest in options.items() if _OPTION_OF.get(rest, rest.lower().replace("_", "-")) in taken]


@contextlib.contextmanager
def _environ(environ: Mapping[str, str]) -> Iterator[None]:
    """Set this process's environment to `environ`, for its children; submitit passes it on."""
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
