"""From what a user types to a run folder: a job id, a run's name, or a path."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from janus_cluster.errors import JobNotFound
from janus_cluster.rundir import RunDir, read_json
from janus_cluster.slurm.recorded import load_submission

_LIST_HINT = "janus-cluster list shows the runs; --runs-dir DIR looks elsewhere"
_NONE_HINT = "janus-cluster submit starts one; JANUS_HOME or --runs-dir DIR names another folder"
_MOST_NAMED = 8


def list_runs(runs_dirs: Sequence[Path]) -> list[RunDir]:
    """Every run folder in the folders, newest first."""
    found: dict[Path, RunDir] = {}
    for folder in runs_dirs:
        if folder.is_dir():
            found |= {p.resolve(): RunDir(p) for p in folder.iterdir() if _is_run(p)}
    return sorted(found.values(), key=lambda run: (_made_at(run), run.name), reverse=True)


def find_run(ref: str, runs_dirs: Sequence[Path]) -> RunDir:
    """The run that `ref` names: a path, a folder name, a job id, a job name (its newest run), or a unique prefix.

    Raises: JobNotFound, naming near matches.
    """
    path = Path(ref).expanduser()
    if _is_run(path):
        return RunDir(path.absolute())
    runs = list_runs(runs_dirs)
    tests = (
        lambda run: run.name == ref,
        lambda run: (sent := load_submission(run)) is not None and sent.job_id == ref,
        lambda run: job_name(run) == ref,
    )
    for is_match in tests:
        # Newest first: a new sandbox counts its jobs from 1 again, and a job name is used often.
        if (match := next(filter(is_match, runs), None)) is not None:
            return match
    beginning = [run for run in runs if ref and run.name.startswith(ref)]
    if len(beginning) == 1:
        return beginning[0]
    raise _not_found(ref, [run.name for run in beginning], runs, runs_dirs)


def job_name(run: RunDir) -> str:
    """The job's name in resolved.json, or the folder's name without its time and short id."""
    try:
        return str(read_json(run.resolved_json)["job"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return run.name.rsplit("-", 2)[0]


def _not_found(ref: str, several: Sequence[str], runs: Sequence[RunDir], runs_dirs: Sequence[Path]) -> JobNotFound:
    if several:
        named = "\n".join(f"  {name}" for name in several[:_MOST_NAMED])
        more = f"\n  … and {len(several) - _MOST_NAMED} more" if len(several) > _MOST_NAMED else ""
        return JobNotFound(f"{ref!r} is the beginning of {len(several)} runs:\n{named}{more}", hint="type more of it")
    for place in (Path(ref).expanduser(), *(folder / ref for folder in runs_dirs)):
        if ref and place.is_dir() and not os.access(place, os.R_OK | os.X_OK):
            return JobNotFound(f"{place}: you may not read it: run folders are their owner's ({_owner(place)}) alone")
    where = ", ".join(str(d) for d in runs_dirs)
    if not runs:
        return JobNotFound(f"no run {ref!r}: there are no runs in {where}", hint=_NONE_HINT)
    ids = [sent.job_id for run in runs if (sent := load_submission(run)) and sent.job_id]
    known = dict.fromkeys([*(job_name(run) for run in runs), *(run.name for run in runs), *ids])
    near = difflib.get_close_matches(ref, known, n=3, cutoff=0.5)
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    return JobNotFound(f"no job id, run name or run folder {ref!r} in {where}{meant}", hint=_LIST_HINT)


def _owner(path: Path) -> str:
    try:
        return path.owner()
    except KeyError:
        return f"user {path.stat().st_uid}"


def _is_run(path: Path) -> bool:
    run = RunDir(path)
    try:
        return any(p.is_file() for p in (run.resolved_json, run.submission_json, run.status_json))
    except OSError:
        return False


def _made_at(run: RunDir) -> float:
    for path in (run.resolved_json, run.submission_json, run.path):
        try:
            return path.stat().st_mtime
        except OSError:
            continue
    return 0.0
