"""Bundles: the files that a run reads, rendered first, written to a private folder, and renamed in one step.

A bundle is never changed afterwards. A new run folder has its first ones; `resume` with other options adds the next.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from janus_cluster.errors import MaybeQueued, UsageError
from janus_cluster.job.env import render_env_sh, render_secrets_env
from janus_cluster.job.resolve import resolve_fallbacks
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.job.schema import JobConfig
from janus_cluster.run.files import replace_link_atomically, write_text_atomically
from janus_cluster.run.paths import BundleDir, RunDir
from janus_cluster.run.records.bundle import ManifestRecord, PlannedMemoryRecord
from janus_cluster.run.sbatch import render_each_node, render_sbatch
from janus_cluster.run.snapshot import write_package

# Text by file name, by number of the bundle. The lowest number is the one to submit, its fallbacks follow.
Bundles = Mapping[int, Mapping[str, str]]

# Shorter values would be found by accident ("1" in any number).
_SHORTEST_SECRET = 6


def render_bundles(
    resolved: ResolvedJob,
    *,
    job_yaml_text: str,
    secrets: Mapping[str, str],
    manifest: ManifestRecord,
    fewer_nodes: Sequence[ResolvedJob] = (),
) -> Bundles:
    """The bundle of this job, those of its fallbacks, and both of the job on fewer nodes. Nothing is written.

    Raises: UsageError for text that cannot be written, and where a secret would be in a readable file.
    """
    if set(secrets) != set(resolved.secret_names):
        raise ValueError("secrets are not those that were resolved")
    found = {}
    for each in (each for head in (resolved, *fewer_nodes) for each in resolve_fallbacks(head)):
        files = _render_files(each, job_yaml_text, manifest)
        _refuse_leaks(files, secrets)
        if secrets:
            files[_bundle_of(each).secrets_env.name] = render_secrets_env(secrets)
        found[each.bundle] = files
    return found


def _bundle_of(resolved: ResolvedJob) -> BundleDir:
    return RunDir(Path(resolved.run_dir)).bundle(resolved.bundle)


def _render_files(resolved: ResolvedJob, job_yaml_text: str, manifest: ManifestRecord) -> dict[str, str]:
    """Text by file name, each writable as UTF-8."""
    bundle = _bundle_of(resolved)
    files = {
        bundle.job_yaml.name: job_yaml_text,
        bundle.resolved_json.name: _json(resolved.model_dump(mode="python")),
        bundle.job_sbatch.name: render_sbatch(resolved),
        bundle.env_sh.name: render_env_of(resolved),
        bundle.ds_config_json.name: _json(resolved.ds_config),
        bundle.manifest_json.name: _manifest_of(resolved, manifest).render(),
    }
    if (each_node := render_each_node(resolved)) is not None:
        files[bundle.each_node_sh.name] = each_node
    for name, text in files.items():
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise UsageError(
                f"{name} would hold {text[e.start : e.end]!r}, a byte that is not UTF-8",
                hint="a path or variable has a damaged name; rename it, or set LANG=C.UTF-8",
            ) from e
    return files


def _manifest_of(resolved: ResolvedJob, manifest: ManifestRecord) -> ManifestRecord:
    """The manifest of the submission, with the way to train that this bundle has of training.memory: auto."""
    if resolved.memory is None:
        return replace(manifest, memory=None)
    option = resolved.memory.option
    return replace(manifest, memory=PlannedMemoryRecord(option=option.words, planned_gb=option.planned_gb))


def render_env_of(resolved: ResolvedJob) -> str:
    """The text of env.sh for this job."""
    return render_env_sh(
        resolved.env, secret_names=resolved.secret_names, secrets_path=_bundle_of(resolved).secrets_env
    )


def render_job_yaml(config: JobConfig, *, source: str, sets: Sequence[str]) -> str:
    """The job as it was given, after --set and ${VAR}: a job file that gives the same job when it is read again."""
    import yaml

    given = _escape_references(config.model_dump(mode="json", exclude_unset=True))
    head = [f"# The job of {json.dumps(source, ensure_ascii=False)} as it was submitted; every value: resolved.json."]
    head += [f"#   --set {json.dumps(text, ensure_ascii=False)}" for text in sets]
    return "\n".join(head) + "\n" + yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=120)


def _escape_references(value: Any) -> Any:
    """Text as a job file spells it: ${ begins a reference there, and $${ is a literal ${."""
    if isinstance(value, str):
        return value.replace("${", "$${")
    if isinstance(value, dict):
        return {key: _escape_references(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_escape_references(below) for below in value]
    return value


def _refuse_leaks(files: Mapping[str, str], secrets: Mapping[str, str]) -> None:
    for name, value in secrets.items():
        forms = {value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]}
        leaking = sorted(f for f, text in files.items() if any(form in text for form in forms))
        if len(value) >= _SHORTEST_SECRET and leaking:
            raise UsageError(
                f"the value of {name} would be written to {', '.join(leaking)}, which others can read",
                hint=f"take it out of the job file and the command line; environment.forward: [{name}] carries it",
            )


@contextlib.contextmanager
def run_written(run: RunDir, bundles: Bundles, *, code: Mapping[str, bytes]) -> Iterator[None]:
    """The new run folder is complete in the block and after it; left by an error, nothing of it remains.

    An existing folder is never touched. `code` is the package as snapshot.py reads it.
    Raises: UsageError if it cannot be written or exists already.
    """
    try:
        made = _write_run(run, bundles, code)
    except OSError as e:
        raise UsageError(
            f"cannot write the run folder {run.path}: {e.strerror or e}",
            hint="choose another place: --set runs_dir=/path, or JANUS_HOME=/path",
        ) from e
    try:
        yield
    except MaybeQueued:
        # A job may be about to start in it.
        raise
    except BaseException:
        shutil.rmtree(run.path, ignore_errors=True)
        _remove_empty(made)
        raise


@contextlib.contextmanager
def bundles_added(run: RunDir, bundles: Bundles) -> Iterator[None]:
    """The run folder has these bundles too in the block and after it; left by an error, it has not. Hold its lock.

    Where this process is killed in the block, they are left unused, and later ones have higher numbers.
    Raises: UsageError if they cannot be written.
    """
    added: list[BundleDir] = []
    try:
        try:
            for number, files in bundles.items():
                with _staged(run.bundles, run.bundle(number).path) as staging:
                    _write_files(staging, files)
                added.append(run.bundle(number))
        except OSError as e:
            raise UsageError(f"cannot write in {run.bundles}: {e.strerror or e}", hint="nothing was changed") from e
        yield
    except MaybeQueued:
        raise
    except BaseException:
        for bundle in added:
            shutil.rmtree(bundle.path, ignore_errors=True)
        raise


def next_number(run: RunDir) -> int:
    """The number of the next new bundle."""
    return max(run.bundle_numbers(), default=0) + 1


def switch_links(run: RunDir, number: int) -> None:
    """The links at the top of the run folder lead to that bundle. Raises: OSError."""
    _link(run, number, at=run.path)


def _link(run: RunDir, number: int, *, at: Path) -> None:
    links, bundle = BundleDir(at), run.bundle(number)
    for link in (
        links.job_yaml, links.resolved_json, links.job_sbatch, links.env_sh, links.ds_config_json, links.manifest_json
    ):  # fmt: skip
        replace_link_atomically(link, (bundle.path / link.name).relative_to(run.path))


def _write_run(run: RunDir, bundles: Bundles, code: Mapping[str, bytes]) -> list[Path]:
    """Returns: the folders above it that were made. Raises: OSError, with everything removed that was made here."""
    if run.path.exists() or run.path.is_symlink():
        raise FileExistsError(None, "it exists already", str(run.path))
    made = [parent for parent in run.path.parents if not parent.exists()]
    try:
        run.path.parent.mkdir(parents=True, exist_ok=True)
        with _staged(run.path.parent, run.path) as staging:
            staged = RunDir(staging)
            staged.bundles.mkdir(mode=0o700)
            for number, files in bundles.items():
                staged.bundle(number).path.mkdir(mode=0o700)
                _write_files(staged.bundle(number).path, files)
            _link(run, min(bundles), at=staging)
            staged.logs.mkdir(mode=0o700)
            if code:
                write_package(code, staged.code)
    except BaseException:
        _remove_empty(made)
        raise
    return made


@contextlib.contextmanager
def _staged(parent: Path, path: Path) -> Iterator[Path]:
    """A private folder that becomes `path` in one step when the block is over, or is removed."""
    staging = Path(tempfile.mkdtemp(dir=parent, prefix=f".{path.name[:64]}."))
    try:
        yield staging
        staging.rename(path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _write_files(folder: Path, files: Mapping[str, str]) -> None:
    # Logs and settings are private. What a job writes is as private as its folder.
    for name, text in files.items():
        is_script = name == BundleDir(folder).job_sbatch.name
        write_text_atomically(folder / name, text, mode=0o700 if is_script else 0o600)


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
