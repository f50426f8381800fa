"""Threshold profiles: data files that say what a sound node looks like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from janus_cluster.errors import UsageError


def load_profile(templates: Path, name: str) -> dict[str, Any]:
    """The thresholds of templates/preflight/<name>.yaml. Raises: UsageError for an unknown profile."""
    path = templates / "preflight" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise UsageError(f"preflight.profile: {name!r}: there is no such profile. Allowed: {known}")
    profile = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(profile, dict):
        raise UsageError(f"{path}: a profile is a mapping")
    return profile
