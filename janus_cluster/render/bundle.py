"""The run folder: everything is rendered first, written beside its place, and moved there in one step."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from janus_cluster.config.schema import JobConfig, ResolvedJob
from janus_cluster.errors import UsageError
from janus_cluster.render.env import render_env_sh, render_secrets_env
from janus_cluster.render.manifest import collect_manifest
from janus_cluster.render.sbatch import render_sbatch
from janus_cluster.rundir import RunDir, write_text_atomically
from janus_cluster.snapshot import write_package

__all__ = [
    "bundle_replaced",
    "collect_manifest",
    "keep_bundle",
    "render_env_of",
    "render_job_yaml",
    "restore_interrupted",
    "write_bundle",
]

# Shorter values would be found by accident ("1" in any number).
_SHORTEST_SECRET = 6
# While history/<n> ends so, the files of the run folder may be a mixture of old and new.
_UNDO = ".undo"


def write_bundle(
    resolved: ResolvedJob,
    *,
    job_yaml_text: str,
    secrets: Mapping[str, str],
    manifest: Mapping[str, Any],
    code: Mapping[str, bytes],
    final_dir: Path,
) -> RunDir:
    """The run folder is complete at `final_dir`, or nothing is left of it. An existing folder is never touched.

    `code` is the package as snapshot.py reads it; the folder holds it where environment.code is snapshot.
    Raises: UsageError if it cannot be written, exists already, or a secret would stand in a readable file.
    """
    run = RunDir(final_dir)
    if str(final_dir) != resolved.run_dir or set(secrets) != set(resolved.secret_names):
        raise ValueError("run folder or secrets are not those that were resolved")
    files = _render_files(resolved, job_yaml_text, manifest)
    _refuse_leaks(files, secrets)
    if secrets:
        files[run.secrets_env.name] = render_secrets_env(secrets)
    try:
        _write_and_move(files, run, code if resolved.job.environment.code == "snapshot" else {})
    except OSError as e:
        raise UsageError(
            f"cannot write the run folder {final_dir}: {e.strerror or e}",
            hint="choose another place: --set runs_dir=/path, or JANUS_HOME=/path",
        ) from e
    return run


def _render_files(resolved: ResolvedJob, job_yaml_text: str, manifest: Mapping[str, Any]) -> dict[str, str]:
    """Text by file name, each writable as UTF-8."""
    run = RunDir(Path(resolved.run_dir))
    files = {
        run.job_yaml.name: job_yaml_text,
        run.resolved_json.name: _json(resolved.model_dump(mode="python")),
        run.job_sbatch.name: render_sbatch(resolved),
        run.env_sh.name: render_env_of(resolved),
        run.ds_config_json.name: _json(resolved.ds_config),
        run.manifest_json.name: _json(manifest),
    }
    for name, text in files.items():
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise UsageError(
                f"{name} would hold {text[e.start : e.end]!r}, a byte that is not UTF-8",
                hint="a path or variable has a damaged name; rename it, or set LANG=C.UTF-8",
            ) from e
    return files


def render_env_of(resolved: ResolvedJob) -> str:
    """The text of env.sh for this job."""
    secrets_path = RunDir(Path(resolved.run_dir)).secrets_env
    return render_env_sh(resolved.env, secret_names=resolved.secret_names, secrets_path=secrets_path)


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
                f"the value of {name} would stand in {', '.join(leaking)}, which others can read",
                hint=f"take it out of the job file and the command line; environment.forward: [{name}] carries it",
            )


def _write_and_move(files: Mapping[str, str], run: RunDir, code: Mapping[str, bytes]) -> None:
    """Raises: OSError, with everything removed that was made here."""
    if run.path.exists() or run.path.is_symlink():
        raise FileExistsError(None, "it exists already", str(run.path))
    made = [parent for parent in run.path.parents if not parent.exists()]
    staging: Path | None = None
    try:
        run.path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=run.path.parent, prefix=f".{run.name[:64]}."))
        # Logs and settings are nobody else's business. What a job writes below is as private as this folder.
        for name, text in files.items():
            write_text_atomically(staging / name, text, mode=0o700 if name == run.job_sbatch.name else 0o600)
        (staging / run.logs.name).mkdir(mode=0o700)
        if code:
            write_package(code, staging / run.code.name)
        staging.chmod(0o700)
        staging.rename(run.path)
    except BaseException:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


@contextlib.contextmanager
def bundle_replaced(resolved: ResolvedJob, *, job_yaml_text: str, secrets: Mapping[str, str]) -> Iterator[None]:
    """The run folder holds the files of `resolved` in the block and after it; those of before lie in history/<n>.

    Where the block is left by an error, every file is what it was; where this process is killed in it, they are after
    restore_interrupted. manifest.json and code/ say what was submitted and stay. Hold the run's lock.
    Raises: UsageError with nothing changed, if it cannot be written or a secret would stand in a readable file.
    """
    run = RunDir(Path(resolved.run_dir))
    if set(secrets) != set(resolved.secret_names):
        raise ValueError("secrets are not those that were resolved")
    files = _render_files(resolved, job_yaml_text, {})
    del files[run.manifest_json.name]
    _refuse_leaks(files, secrets)
    if secrets:
        files[run.secrets_env.name] = render_secrets_env(secrets)
    undo: Path | None = None
    try:
        try:
            undo = _keep_bundle(run)
            for name in _replaceable(run):
                _write_or_remove(run.path / name, files.get(name), is_script=name == run.job_sbatch.name)
        except OSError as e:
            raise UsageError(f"cannot write in {run.path}: {e.strerror or e}", hint="nothing was changed") from e
        yield
    except BaseException:
        if undo is not None:
            _put_back(run, undo)
        raise
    undo.rename(undo.with_suffix(""))


def keep_bundle(run: RunDir) -> Path:
    """history/<n> holds the files of the run folder as they are; the attempt that runs is about to replace some."""
    undo = _keep_bundle(run)
    return undo.rename(undo.with_suffix(""))


def restore_interrupted(run: RunDir) -> bool:
    """What a bundle_replaced that was killed had changed is as before. Hold the run's lock. Returns: was there one?"""
    for torn in run.history.glob(".*"):
        shutil.rmtree(torn, ignore_errors=True)
    left = sorted(run.history.glob(f"*{_UNDO}"))
    for undo in left:
        _put_back(run, undo)
    return bool(left)


def _replaceable(run: RunDir) -> tuple[str, ...]:
    files = (run.job_yaml, run.resolved_json, run.job_sbatch, run.env_sh, run.ds_config_json, run.secrets_env)
    return tuple(path.name for path in files)


def _keep_bundle(run: RunDir) -> Path:
    """history/<n>.undo holds the files that will be replaced; it appears in one step, when it is whole."""
    run.history.mkdir(mode=0o700, exist_ok=True)
    number = 1 + max((int(p.stem) for p in run.history.iterdir() if p.stem.isdigit()), default=0)
    staging = Path(tempfile.mkdtemp(dir=run.history, prefix="."))
    for name in _replaceable(run):
        if (run.path / name).exists():
            _write_or_remove(
                staging / name, (run.path / name).read_text("utf-8"), is_script=name == run.job_sbatch.name
            )
    return staging.rename(run.history / f"{number}{_UNDO}")


def _put_back(run: RunDir, undo: Path) -> None:
    for name in _replaceable(run):
        kept = undo / name
        text = kept.read_text("utf-8") if kept.exists() else None
        _write_or_remove(run.path / name, text, is_script=name == run.job_sbatch.name)
    shutil.rmtree(undo)
    with contextlib.suppress(OSError):
        run.history.rmdir()


def _write_or_remove(path: Path, text: str | None, *, is_script: bool) -> None:
    if text is None:
        path.unlink(missing_ok=True)
    else:
        write_text_atomically(path, text, mode=0o700 if is_script else 0o600)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
