"""What a run was made from: code, packages, interpreter, and the sha256 of its inputs. Reads; changes nothing."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

import janus_cluster
from janus_cluster.job.resources import templates_dir
from janus_cluster.job.templates import template_paths
from janus_cluster.run.records.bundle import CodeRecord, GitRecord, JobFileRecord, ManifestRecord, PythonRecord
from janus_cluster.run.snapshot import PACKAGE, hash_files, hash_package

_GIT_TIMEOUT_S = 5
# fmt: off
_PACKAGES = (
    "accelerate", "click", "deepspeed", "flash-attn", "jinja2", "numpy", "nvidia-nccl-cu12", "nvidia-nccl-cu13",
    "pillow", "pydantic", "pyyaml", "safetensors", "submitit", "tokenizers", "torch", "transformers", "triton",
)
# fmt: on


def collect_manifest(job_file: Path, *, code: Mapping[str, bytes]) -> ManifestRecord:
    """What the run is made from. The package versions are those beside the interpreter that submits; null: not there.

    `code` is the package that submits, as snapshot.py reads it.
    """
    root = templates_dir()
    return ManifestRecord(
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        janus_version=janus_cluster.__version__,
        git=_git_state(Path(janus_cluster.__file__).resolve().parent.parent),
        host=platform.node(),
        user=_user_name(),
        python=PythonRecord(version=platform.python_version(), executable=sys.executable),
        packages={name: _version(name) for name in _PACKAGES},
        job_file=JobFileRecord(path=str(job_file), sha256=_sha256(job_file)),
        templates={str(path.relative_to(root)): _sha256(path) for path in template_paths()},
        code=CodeRecord(path=str(PACKAGE), sha256=hash_package(code), files=hash_files(code)),
    )


def _git_state(checkout: Path) -> GitRecord | None:
    """Commit and uncommitted changes of the checkout that this code runs from; None for an installed wheel."""
    if not (checkout / ".git").exists() or not (checkout / "pyproject.toml").is_file():
        return None
    try:
        commit = _git(checkout, "rev-parse", "HEAD").strip()
        changes = _git(checkout, "status", "--porcelain", "--untracked-files=normal")
        diff = _git(checkout, "diff", "HEAD", "--no-ext-diff", "--no-color") if changes else b""
    except (OSError, subprocess.SubprocessError) as e:
        return GitRecord(error=f"git could not be asked: {e}")
    dirty = hashlib.sha256(changes + b"\0" + diff).hexdigest() if changes else None
    return GitRecord(commit=commit.decode(), dirty_sha256=dirty)


def _git(checkout: Path, *args: str) -> bytes:
    argv = ["git", "-C", str(checkout), *args]
    # No lock is taken on the index: a commit may be under way.
    environ = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    return subprocess.run(argv, capture_output=True, check=True, timeout=_GIT_TIMEOUT_S, env=environ).stdout


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _user_name() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
