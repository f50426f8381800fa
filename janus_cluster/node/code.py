"""Is it still the same code and the same packages? Asked at the start of every attempt, before anything else runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from janus_cluster.config.schema import ResolvedJob
from janus_cluster.errors import UsageError
from janus_cluster.preflight.sysfs import NodeRoot
from janus_cluster.preflight.versions import read_versions
from janus_cluster.rundir import RunDir, read_json, write_json_atomically
from janus_cluster.snapshot import PACKAGE, hash_files, read_package

_MOST_NAMED = 5


def check_code(run: RunDir, resolved: ResolvedJob, *, attempt: int) -> list[str]:
    """What differs from the submission or from the first attempt, one line each.

    versions.json of this attempt is written.
    Raises: UsageError where other code would run than was submitted and environment.on_code_change is fail.
    """
    change = find_code_change(run)
    if change is not None and resolved.job.environment.on_code_change == "fail":
        raise UsageError(
            f"{change}; environment.on_code_change: fail",
            hint=f"bring that code back, then: janus-cluster resume {run.name}; "
            f"or make a new run of today's code: janus-cluster submit {run.job_yaml}",
        )
    versions = compare_versions(run, attempt=attempt)
    return [line for line in (change, versions) if line is not None]


def find_code_change(run: RunDir) -> str | None:
    """How the janus_cluster that runs here differs from the one that was submitted; None for the same."""
    try:
        submitted = read_json(run.manifest_json)["code"]["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{run.manifest_json} does not say which code was submitted; what runs is {PACKAGE}"
    now = hash_files(read_package())
    changed = sorted(name for name in {*submitted, *now} if submitted.get(name) != now.get(name))
    if not changed:
        return None
    named = ", ".join(changed[:_MOST_NAMED]) + (" and others" if len(changed) > _MOST_NAMED else "")
    files = "1 file differs" if len(changed) == 1 else f"{len(changed)} files differ"
    return f"janus_cluster has changed since it was submitted: {files} in {PACKAGE}: {named}"


def compare_versions(run: RunDir, *, attempt: int) -> str | None:
    """Which packages changed since the first attempt, `torch 2.13.0 → 2.14.0`; None for none.

    versions.json of this attempt holds those that it runs with, on its first node.
    """
    now = read_versions(NodeRoot.of(None))
    write_json_atomically(run.versions_json(attempt), now)
    for earlier in (number for number in run.attempts() if number < attempt):
        try:
            before = dict(read_json(run.versions_json(earlier)))
        except (OSError, ValueError, TypeError):
            continue
        changed = _differences(before, now)
        return f"versions changed since attempt {earlier}: {', '.join(changed)}" if changed else None
    return None


def _differences(before: Mapping[str, Any], now: Mapping[str, str | None]) -> list[str]:
    names = [*before, *(name for name in now if name not in before)]
    return [
        f"{name} {before.get(name) or 'none'} → {now.get(name) or 'none'}"
        for name in names
        if before.get(name) != now.get(name)
    ]
