"""The one door from rendering to the disk: shipped profiles, templates and name lists become objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from janus_cluster.errors import UsageError
from janus_cluster.resources import templates_dir


def load_env_profile(name: str) -> list[dict[str, Any]]:
    """The entries of templates/env/<name>.yaml. Raises: UsageError naming the profiles that exist."""
    import yaml

    path = _profile_path("env", name, ".yaml", key="environment.profile")
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(data, list):
        raise UsageError(f"{path}: not a list of variables")
    return data


def load_ds_profile(name: str) -> dict[str, Any]:
    """The object of templates/deepspeed/<name>.json. Raises: UsageError naming the profiles that exist."""
    path = _profile_path("deepspeed", name, ".json", key="deepspeed.profile")
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise UsageError(f"{path}: not a JSON object")
    return data


def load_nccl_variable_names() -> frozenset[str]:
    """Every name that some NCCL release reads."""
    lines = (templates_dir() / "env" / "nccl_variables.txt").read_text(encoding="utf-8").splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))


def load_sbatch_templates() -> dict[str, str]:
    """The text of every template in templates/sbatch, by file name."""
    found = sorted((templates_dir() / "sbatch").glob("*.sbatch.j2"))
    return {path.name: path.read_text(encoding="utf-8") for path in found}


def template_paths() -> list[Path]:
    """Every shipped file that run folders are rendered from; manifest.json holds their sha256."""
    root = templates_dir()
    return sorted(p for room in ("deepspeed", "env", "sbatch") for p in (root / room).iterdir() if p.is_file())


def _profile_path(folder: str, name: str, suffix: str, *, key: str) -> Path:
    path = templates_dir() / folder / f"{name}{suffix}"
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob(f"*{suffix}"))
        raise UsageError(f"{key}: there is no profile {name!r}", hint=f"one of: {', '.join(known)}")
    return path
