"""Hooks, hosted CI and make run the same commands; the version is written once."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent


def recipe(target: str) -> list[str]:
    """The commands of a target of the Makefile, with the environment's folder filled in."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", text, re.MULTILINE)
    assert found is not None, target
    return [line.strip().removeprefix("@").replace("$(BIN)", ".venv/bin") for line in found[1].splitlines()]


def test_pre_commit_runs_the_commands_of_make_check() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (local,) = config["repos"]
    assert [hook["entry"] for hook in local["hooks"]] == recipe("check")
    assert not any(hook["pass_filenames"] for hook in local["hooks"])


def test_hosted_ci_runs_what_ci_runs() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    assert job["steps"][-1]["run"].splitlines()[-1] == ".ci/run"
    # YAML reads the key `on` as true.
    assert "pull_request" in workflow[True]


def test_the_version_is_written_once() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in project
    assert re.search(r"^version = ", project, re.MULTILINE) is None


def test_the_changelog_begins_with_this_version_and_has_three_kinds_of_entries() -> None:
    from janus_cluster import __version__

    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (\S+)", text, re.MULTILINE)
    assert versions[0] == __version__.partition(".dev")[0]
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= {"Added", "Changed", "Fixed", "Removed"}
    assert not re.search(r"^## .+\n\n(?!### )", text, re.MULTILINE), "every entry is under a kind"
