"""What Slurm said in the last seconds, kept for who looks again and again (`watch -n1 janus-cluster status`).

A controller serves a whole site. One file per user, 0600, replaced whole. An answer is used again only
  - while it is younger than the caller allows,
  - for a job that was sent before it was given,
  - while the job's own status.json says the same state and attempt as then;
who has to ask asks for what others lately wanted to know of the same Slurm too, so that a site is asked once for all;
and whoever changes a job (scancel, requeue, …) throws all of them away. What could not be asked is not kept.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from janus_cluster.config.home import slurm_answers_json
from janus_cluster.rundir import write_text_atomically
from janus_cluster.slurm.commands import SlurmJob

# A file of jobs that were watched an hour ago would only grow.
_FORGET_AFTER_S = 60.0
# A squeue takes a tenth of a second; who waits for a controller that does not answer must not queue up behind others.
LONGEST_TURN_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One answer: the job, None for one that Slurm does not know. `word` is what status.json said before it was asked.

    Units: asked_at (when Slurm was asked) and wanted_at (when a reader last asked for this job) in epoch seconds.
    """

    asked_at: float
    wanted_at: float
    word: str | None
    job: SlurmJob | None


def name_answer(conf: Path | None, job_id: str) -> str:
    """Which Slurm, and the job's number there, as one text."""
    which = str(conf) if conf is not None else os.environ.get("SLURM_CONF", "")
    return "\n".join((which, os.environ.get("SLURM_CLUSTERS", ""), job_id))


def lately_wanted(conf: Path | None, *, now: float, path: Path | None = None) -> dict[str, Kept]:
    """What is known of the jobs of one Slurm that somebody still looks at, by job id."""
    which = name_answer(conf, "")
    found = {name.removeprefix(which): kept for name, kept in load_kept(path).items() if name.startswith(which)}
    return {job_id: k for job_id, k in found.items() if job_id.isdigit() and _is_recent(k.wanted_at, now)}


def load_kept(path: Path | None = None) -> dict[str, Kept]:
    """The answers by name; empty where there is no file of ours, or a damaged one."""
    try:
        with (path or slurm_answers_json()).open("rb") as f:
            about = os.fstat(f.fileno())
            if about.st_uid != os.getuid() or not stat.S_ISREG(about.st_mode):
                return {}
            answers = json.loads(f.read())["answers"]
        return {str(name): _kept(value) for name, value in answers.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_kept(answers: Mapping[str, Kept], *, now: float, path: Path | None = None) -> None:
    """The file holds the answers, where it has none that is younger; a folder that cannot be written is left alone."""
    path = path or slurm_answers_json()
    held = {n: k for n, k in load_kept(path).items() if _is_recent(k.asked_at, now) and _is_recent(k.wanted_at, now)}
    joined = held | {n: _join(k, held.get(n, k)) for n, k in answers.items()}
    value = {"schema_version": 1, "answers": {n: asdict(k) for n, k in joined.items()}}
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_text_atomically(path, json.dumps(value), mode=0o600)


@contextlib.contextmanager
def one_asks(path: Path | None = None) -> Iterator[None]:
    """Of this user's commands that look, one asks and the others wait for it, none longer than LONGEST_TURN_S.

    Where no lock can be had, as on some file systems, all of them ask.
    """
    path = path or slurm_answers_json()
    fd = None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        _wait_for(fd)
    except OSError:
        pass
    try:
        yield
    finally:
        if fd is not None:
            os.close(fd)


def _wait_for(fd: int) -> None:
    deadline = time.monotonic() + LONGEST_TURN_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                return
            time.sleep(0.05)


def forget_kept(path: Path | None = None) -> None:
    """No answer is kept any more."""
    # RuntimeError: a user without a home folder, as on some nodes.
    with contextlib.suppress(OSError, RuntimeError):
        (path or slurm_answers_json()).unlink(missing_ok=True)


def _is_recent(moment: float, now: float) -> bool:
    # Who waited for another one's turn finds what is a moment later than its own beginning.
    return -LONGEST_TURN_S <= now - moment < _FORGET_AFTER_S


def _join(one: Kept, other: Kept) -> Kept:
    youngest = other if other.asked_at > one.asked_at else one
    return replace(youngest, wanted_at=max(one.wanted_at, other.wanted_at))


def _kept(value: Mapping[str, object]) -> Kept:
    """Raises: KeyError, TypeError, ValueError for another shape."""
    word, job = value["word"], value["job"]
    if not isinstance(word, (str, type(None))):
        raise TypeError("word")
    asked_at, wanted_at = _seconds(value["asked_at"]), _seconds(value["wanted_at"])
    return Kept(asked_at=asked_at, wanted_at=wanted_at, word=word, job=None if job is None else _job(job))


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError("seconds")
    return float(value)


def _job(value: object) -> SlurmJob:
    if not isinstance(value, dict) or not isinstance(value.get("state"), str):
        raise TypeError("job")
    return SlurmJob(**(value | {"nodes": tuple(map(str, value["nodes"]))}))
