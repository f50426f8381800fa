"""Find the run folder that a user names: by a job id, a run's name, or a path."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from janus_cluster.errors import JobNotFound
from janus_cluster.job.home import runs_dir
from janus_cluster.job.nearest import did_you_mean
from janus_cluster.run.current import has_bundles, require_bundles
from janus_cluster.run.next_command import known_runs_dirs
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.bundle import ResolvedRecord
from janus_cluster.run.records.submission import load_submission

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


def list_readable_runs(runs_dirs: Sequence[Path]) -> list[RunDir]:
    """list_runs without the run folders of janus-cluster 0.1."""
    return [run for run in list_runs(runs_dirs) if has_bundles(run)]


def find_run(ref: str, runs_dirs: Sequence[Path]) -> RunDir:
    """The run that `ref` names: a path, a folder name, a job id, a job name, or a unique prefix.

    A job name means its newest run that trains; a run of the gate alone only where the job has no other.

    Where `runs_dirs` is the default, names and job ids of the other folders that runs were made in are known too.

    Raises: JobNotFound, naming near matches; UsageError for a run folder of janus-cluster 0.1.
    """
    path = Path(os.path.expanduser(ref))
    if _is_run(path):
        return _readable(RunDir(path.absolute()))
    runs = list_runs(runs_dirs)
    found = _find_named(ref, runs)
    # Newest first: a job name is used often.
    if found is None:
        named = [run for run in runs if job_name(run) == ref]
        found = next((run for run in named if run_kind(run) == "train"), named[0] if named else None)
    if found is None and list(runs_dirs) == [runs_dir()]:
        found = _find_named(ref, list_runs(known_runs_dirs()))
    if found is not None:
        return _readable(found)
    beginning = [run for run in runs if ref and run.name.startswith(ref)]
    if len(beginning) == 1:
        return _readable(beginning[0])
    raise _not_found(ref, [run.name for run in beginning], runs, runs_dirs)


def _find_named(ref: str, runs: Sequence[RunDir]) -> RunDir | None:
    """The run of that folder name or job id; of several, the newest: a new sandbox counts its jobs from 1 again."""
    named = next((run for run in runs if run.name == ref), None)
    return named or next((run for run in runs if (sent := load_submission(run)) and sent.job_id == ref), None)


def _readable(run: RunDir) -> RunDir:
    require_bundles(run)
    return run


def job_name(run: RunDir) -> str:
    """The job's name in resolved.json, or the folder's name without its time and short id."""
    # The name is the same in every bundle.
    resolved = ResolvedRecord.load(run.bundle(1).resolved_json)
    name = resolved.value("name") if resolved else None
    return name if isinstance(name, str) else run.name.rsplit("-", 2)[0]


def run_kind(run: RunDir) -> str:
    """train, preflight or index; train where that cannot be read."""
    resolved = ResolvedRecord.load(run.bundle(1).resolved_json)
    return str((resolved.value("kind") if resolved else None) or "train")


def _not_found(ref: str, several: Sequence[str], runs: Sequence[RunDir], runs_dirs: Sequence[Path]) -> JobNotFound:
    if several:
        named = "\n".join(f"  {name}" for name in several[:_MOST_NAMED])
        more = f"\n  … and {len(several) - _MOST_NAMED} more" if len(several) > _MOST_NAMED else ""
        return JobNotFound(f"{ref!r} is the beginning of {len(several)} runs:\n{named}{more}", hint="type more of it")
    for place in (Path(os.path.expanduser(ref)), *(folder / ref for folder in runs_dirs)):
        if ref and place.is_dir() and not os.access(place, os.R_OK | os.X_OK):
            return JobNotFound(f"{place}: you may not read it: run folders are their owner's ({_owner(place)}) alone")
    where = ", ".join(str(d) for d in runs_dirs)
    if not runs:
        return JobNotFound(f"no run {ref!r}: there are no runs in {where}", hint=_NONE_HINT)
    ids = [sent.job_id for run in runs if (sent := load_submission(run)) and sent.job_id]
    known = dict.fromkeys([*(job_name(run) for run in runs), *(run.name for run in runs), *ids])
    meant = did_you_mean(ref, known, cutoff=0.5, most=3)
    return JobNotFound(f"no job id, run name or run folder {ref!r} in {where}{meant}", hint=_LIST_HINT)


def _owner(path: Path) -> str:
    try:
        return path.owner()
    except KeyError:
        return f"user {path.stat().st_uid}"


def _is_run(path: Path) -> bool:
    run = RunDir(path)
    try:
        # The links are there in a run folder of 0.1 too, where they were files.
        marks = (run.links.resolved_json, run.submission_json, run.status_json)
        return has_bundles(run) or any(p.is_file() for p in marks)
    except OSError:
        return False


def _made_at(run: RunDir) -> float:
    for path in (run.bundle(1).resolved_json, run.submission_json, run.path):
        try:
            return path.stat().st_mtime
        except OSError:
            continue
    return 0.0
