"""The commands that a message prints to be typed. Each works in a shell in any folder.

A run is named by its job id or its name where `find_run` finds it by these, else by its folder.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from janus_cluster.job.home import runs_dir, site_dir
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.base import Record, parse_json
from janus_cluster.run.records.submission import load_submission

PROGRAM = "janus-cluster"


def command_for(verb: str, run: RunDir, options: str = "") -> str:
    """`janus-cluster VERB RUN OPTIONS`. `options` are quoted already."""
    return f"{PROGRAM} {verb} {name_of(run)} {options}".rstrip()


def submit_command(run: RunDir, verb: str = "submit") -> str:
    """The line that submits the job of the run as a new run."""
    return f"{PROGRAM} {verb} {shlex.quote(str(run.links.job_yaml))}"


def name_of(run: RunDir) -> str:
    """What names this run, and no other, in a command: quoted for a shell."""
    if run.path.parent not in (runs_dir(), *known_runs_dirs()):
        return shlex.quote(str(run.path))
    sent = load_submission(run)
    # A sandbox counts its jobs from 1 each time, and two clusters of a site have the same numbers.
    if sent is not None and sent.job_id and sent.cluster == "slurm" and not sent.slurm_cluster:
        return sent.job_id
    return shlex.quote(run.name)


@dataclass(frozen=True, kw_only=True)
class RunsDirRecord(Record):
    """A line of runs_dirs.jsonl: a folder that runs were made in."""

    path: Path


def remember_runs_dir(folder: Path) -> None:
    """Runs of the folder are found by name from everywhere. Raises: OSError."""
    if folder not in known_runs_dirs():
        _runs_dirs_jsonl().parent.mkdir(parents=True, exist_ok=True)
        RunsDirRecord(path=folder).append(_runs_dirs_jsonl())


def known_runs_dirs() -> list[Path]:
    """The folders that runs were made in, the last new one first; a line that cannot be read is left out."""
    try:
        lines = _runs_dirs_jsonl().read_bytes().splitlines()
    except OSError:
        return []
    found: dict[Path, None] = {}
    for line in reversed(lines):
        try:
            found.setdefault(RunsDirRecord.from_json(parse_json(line)).path)
        except ValueError:
            continue
    return list(found)


def _runs_dirs_jsonl() -> Path:
    return site_dir() / "runs_dirs.jsonl"
