"""Hand a run folder over to Slurm or to this machine: afterwards it is submitted and recorded, or neither.

A Ctrl-C between sbatch's acceptance and our record would leave an unrecorded job. Signals that end a program are
deferred meanwhile; sbatch runs in a session of its own, where none reaches it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from janus_cluster.errors import JanusError, MaybeQueued, SandboxFailed, SlurmUnavailable, UsageError
from janus_cluster.job.home import sandbox_home
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.run.bundle import Bundles, switch_links
from janus_cluster.run.lock import open_lock, take_lock
from janus_cluster.run.next_command import command_for, remember_runs_dir
from janus_cluster.run.paths import BundleDir, RunDir
from janus_cluster.run.records.bundle import load_resolved
from janus_cluster.run.records.submission import Cluster, SubmissionRecord

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_WATCH_S = 0.05
_WHY_UNWRITABLE = {
    errno.EROFS: "findmnt -T {path}   # why does it take no writes?",
    errno.ENOSPC: "df -h {path}   # make room first",
}


@dataclass(frozen=True)
class RunAttempt:
    """What submitit records as the submitted function: the attempt that job.sbatch starts."""

    run_dir: str
    bundle: int

    def __call__(self) -> int:
        from janus_cluster.node.attempt import build_launcher, run_job

        run = RunDir(Path(self.run_dir))
        resolved = load_resolved(run.bundle(self.bundle))
        return run_job(run, self.bundle, build_launcher("slurm", resolved, os.environ))


@contextlib.contextmanager
def signals_held(waiting_for: str) -> Iterator[list[int]]:
    """Run the block to its end; signals that arrive meanwhile are delivered afterwards. Yields: those that arrived."""
    arrived: list[int] = []
    # While something is sent, sys.stderr collects submitit's messages.
    stderr = sys.stderr
    if threading.current_thread() is not threading.main_thread():
        # Python delivers signals to the main thread only.
        yield arrived
        return

    def note(signum: int, _frame: FrameType | None = None) -> None:
        arrived.append(signum)
        print(f"one moment: {waiting_for}", file=stderr, flush=True)

    # Threads that a library started before do not block them, hence the handlers; Ctrl-C must be answered at once,
    # hence the watch.
    before = {signum: signal.signal(signum, note) for signum in _ENDING}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    is_over = threading.Event()
    watch = threading.Thread(target=_watch_signals, args=(note, is_over), daemon=True)
    watch.start()
    try:
        yield arrived
    finally:
        is_over.set()
        watch.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for signum, handler in before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        for number in dict.fromkeys(arrived):
            signal.raise_signal(number)


def _watch_signals(note: Callable[[int], None], is_over: threading.Event) -> None:
    # Not sigtimedwait's own limit: stopped and continued meanwhile (Ctrl-Z), it returns a signal that was not sent.
    while not is_over.wait(_WATCH_S):
        if (info := signal.sigtimedwait(_ENDING, 0)) is not None:
            note(info.si_signo)


@contextlib.contextmanager
def run_locked(run: RunDir) -> Iterator[None]:
    """Keep other submits and resumes from sending this run inside the block. Raises: UsageError while one does."""
    with contextlib.ExitStack() as stack:
        try:
            # Where the file system has no locks, Slurm is asked for live jobs nevertheless.
            take_lock(stack.enter_context(open_lock(run.submit_lock)))
        except BlockingIOError as e:
            raise UsageError(
                f"another janus-cluster is sending {run.name} at this moment", hint=command_for("status", run)
            ) from e
        except OSError as e:
            look = _WHY_UNWRITABLE.get(e.errno or 0, "ls -ld {path}   # is it yours?")
            raise UsageError(
                f"{run.path} cannot be written: {e.strerror or e}", hint=look.format(path=shlex.quote(str(run.path)))
            ) from e
        yield


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A submission that was checked and rendered; nothing is written yet. `bundles`: the new ones, if any.

    `options` go to sbatch beside those of the script. `patience_s`: how long the queue is searched for a job of which
    sbatch's answer was lost.
    """

    run: RunDir
    resolved: ResolvedJob
    bundles: Bundles
    cluster: Cluster
    slurm_conf: Path | None
    # The cluster of an earlier submission, which `resume` keeps; None: the environment's.
    slurm_cluster: str | None = None
    options: Sequence[str] = ()
    notes: Sequence[str] = ()
    patience_s: float = 120.0

    @property
    def bundle(self) -> BundleDir:
        """The bundle that is sent."""
        return self.run.bundle(self.resolved.bundle)


def require_cluster(cluster: Cluster, environ: Mapping[str, str], *, slurm_conf: Path | None = None) -> Path | None:
    """The slurm.conf to submit with: the sandbox's, else the one that is given. None on this machine.

    Raises: SlurmUnavailable, SandboxFailed.
    """
    if cluster == "local":
        return None
    from janus_cluster.slurm.submission import require_slurm

    conf = sandbox_conf(environ) if cluster == "sandbox" else slurm_conf
    require_slurm(conf)
    return conf


def sandbox_conf(environ: Mapping[str, str]) -> Path:
    """The slurm.conf of the running sandbox. Raises: SandboxFailed; SlurmUnavailable where none could be started."""
    from janus_cluster.sandbox.state import load_info

    info = load_info(sandbox_home(environ))
    if info is None:
        from janus_cluster.sandbox.programs import find_missing

        if missing := find_missing():
            packages = " ".join(sorted(set(missing.values())))
            raise SlurmUnavailable(
                f"no sandbox Slurm is running, and this machine has no {', '.join(missing)}",
                hint=f"apt-get install {packages}; then janus-cluster sandbox up; --cluster local needs no Slurm",
            )
        raise SandboxFailed("no sandbox Slurm is running", hint="janus-cluster sandbox up")
    return Path(info.slurm_conf)


def hand_over(prepared: Prepared, written: contextlib.AbstractContextManager[None], *, is_dry_run: bool = False) -> str:
    """Write what `written` writes and queue or start the job; neither, where either is known to have failed.

    Returns: the job id; "" after a dry run. Raises: as send does.
    """
    job_id = ""
    if not is_dry_run:
        with contextlib.suppress(OSError):
            # Without it the printed commands name the folder.
            remember_runs_dir(prepared.run.path.parent)
    with signals_held("the job is being handed over") as arrived:
        with written:
            if arrived:
                raise KeyboardInterrupt
            if not is_dry_run:
                job_id = send(prepared)
        if arrived and job_id:
            print(
                f"submitted as job {job_id} nevertheless; {command_for('cancel', prepared.run)} ends it",
                file=sys.stderr,
            )
    return job_id


def send(prepared: Prepared) -> str:
    """Queue or start the run and record it in submission.json; earlier submissions are kept as history.

    Call it with signals held. Returns: the job id.
    Raises:  SubmitFailed, SlurmUnavailable; JanusError where it could not be recorded: the job was then cancelled.
    """
    run, bundle = prepared.run, prepared.bundle
    before = SubmissionRecord.load(run.submission_json)
    record = SubmissionRecord(
        cluster=prepared.cluster,
        bundle=bundle.number,
        attempts_before=max(run.attempts(), default=0),
        submitted_at=time.time(),
        batch_log_bytes=run.batch_log.stat().st_size if run.batch_log.exists() else 0,
        history=before.all() if before else (),
    )
    if prepared.cluster == "local":
        from janus_cluster.desk.local import local_command, submit_local

        record = replace(record, command=tuple(local_command(bundle)), job_id=submit_local(run, bundle))
    else:
        record = _sbatch(prepared, record)
    job_id = str(record.job_id)
    try:
        record.write(run.submission_json, mode=0o600)
    except OSError as e:
        _cancel_unrecorded(job_id, record)
        raise JanusError(f"job {job_id} was cancelled: {run.submission_json} could not be written ({e})") from e
    try:
        switch_links(run, bundle.number)
    except OSError as e:
        print(f"the links at the top of {run.path} are not those of {bundle.path}: {e}", file=sys.stderr)
    return job_id


def _sbatch(prepared: Prepared, record: SubmissionRecord) -> SubmissionRecord:
    """The record with the job that sbatch queued. Raises: as submit_run.

    A job that may be queued is recorded without an id.
    """
    from janus_cluster.slurm.commands import Slurm
    from janus_cluster.slurm.submission import sbatch_command, submit_run

    run, bundle, options = prepared.run, prepared.bundle, prepared.options
    slurm = Slurm(conf=prepared.slurm_conf, cluster=prepared.slurm_cluster)
    environ = slurm.environ()
    conf, clusters = environ.get("SLURM_CONF"), environ.get("SLURM_CLUSTERS", "")
    record = replace(
        record,
        command=tuple(sbatch_command(bundle, options)),
        slurm_conf=Path(conf) if conf else None,
        # Of several, sbatch chooses one.
        slurm_cluster=None if "," in clusters else clusters,
    )
    earlier = {sent.job_id for sent in record.history if sent.job_id}
    try:
        queued = submit_run(
            bundle,
            RunAttempt(str(run.path), bundle.number),
            folder=run.submitit,
            slurm=slurm,
            options=options,
            earlier=earlier,
            patience_s=prepared.patience_s,
        )
    except MaybeQueued:
        with contextlib.suppress(OSError):
            record.write(run.submission_json, mode=0o600)
        raise
    return replace(record, job_id=queued.job_id, slurm_cluster=queued.cluster or record.slurm_cluster)


def _cancel_unrecorded(job_id: str, record: SubmissionRecord) -> None:
    if job_id.startswith("local-"):
        os.killpg(int(job_id.removeprefix("local-")), signal.SIGTERM)
        return
    from janus_cluster.slurm.state import slurm_of

    slurm_of(record).scancel(job_id)
