"""pyproject.toml, the lock files of requirements/ and the gate's ranges agree on every package."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from janus_cluster.job.profiles import load_preflight_profile

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OF_USERS = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["train"]]
OF_USERS += PROJECT["optional-dependencies"]["report"]
ALL = [Requirement(line) for line in (*OF_USERS, *PROJECT["optional-dependencies"]["dev"])]
# Of 3.11, the oldest Python that training has.
PYTHON = {"python_version": "3.11", "python_full_version": "3.11.9"}


def pins(name: str) -> dict[str, Version]:
    """Package -> its version on Python 3.11 in requirements/<name>.txt."""
    found = {}
    for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines():
        if line[:1].isalnum():
            requirement = Requirement(line.rstrip(" \\"))
            if requirement.marker is None or requirement.marker.evaluate(PYTHON):
                found[requirement.name.lower()] = Version(str(requirement.specifier).removeprefix("=="))
    return found


@pytest.mark.parametrize("requirement", ALL, ids=str)
def test_the_locked_version_is_within_the_range(requirement: Requirement) -> None:
    locked = pins("locked") | pins("torch")
    assert requirement.specifier.contains(locked[requirement.name.lower()])


@pytest.mark.parametrize("requirement", [Requirement(line) for line in OF_USERS], ids=str)
def test_what_the_range_begins_with_is_what_test_oldest_installs(requirement: Requirement) -> None:
    (lowest,) = (s.version for s in requirement.specifier if s.operator in (">=", "=="))
    assert pins("oldest")[requirement.name.lower()] == Version(lowest)


def test_every_locked_file_has_a_hash() -> None:
    text = (ROOT / "requirements" / "locked.txt").read_text()
    entries = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    assert len(entries) > 50
    assert [entry.partition(" ")[0] for entry in entries if "--hash=sha256:" not in entry] == []


@pytest.mark.parametrize("profile", sorted((ROOT / "templates" / "preflight").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_gate_wants_the_versions_of_pyproject(profile: Path) -> None:
    ranges = load_preflight_profile(profile.stem)["versions"]
    assert Version(ranges["python_min"]) == Version("3.11"), "the packages of training have no build for less"
    bounds = {r.name: {s.operator: s.version for s in r.specifier} for r in ALL}
    for package in ("torch", "transformers", "deepspeed"):
        assert Version(ranges[f"{package}_min"]) == Version(bounds[package][">="])
        assert ranges.get(f"{package}_below") == bounds[package].get("<")
