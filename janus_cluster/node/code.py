"""Compare code and packages with those of the submission, at the start of every attempt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from janus_cluster.errors import UsageError
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.preflight.sysfs import NodeRoot
from janus_cluster.preflight.versions import read_versions
from janus_cluster.run.next_command import command_for, submit_command
from janus_cluster.run.paths import BundleDir, RunDir
from janus_cluster.run.records.attempt import VersionsRecord
from janus_cluster.run.records.bundle import ManifestRecord
from janus_cluster.run.snapshot import PACKAGE, hash_files, read_package

_MOST_NAMED = 5


class CodeChanged(UsageError):
    """The code to run differs from the submitted code, and the job forbids that."""

    kind = "environment"


def check_code(run: RunDir, resolved: ResolvedJob, *, attempt: int) -> list[str]:
    """What differs from the submission or from the first attempt, one line each.

    versions.json of this attempt is written.
    Raises: CodeChanged where the code differs from the submission and environment.on_code_change is fail.
    """
    change = find_code_change(run.bundle(resolved.bundle))
    if change is not None and resolved.job.environment.on_code_change == "fail":
        raise CodeChanged(
            f"{change}; environment.on_code_change: fail",
            hint=f"bring that code back, then: {command_for('resume', run)}; "
            f"or make a new run of today's code: {submit_command(run)}",
        )
    versions = compare_versions(run, attempt=attempt)
    return [line for line in (change, versions) if line is not None]


def find_code_change(bundle: BundleDir) -> str | None:
    """How the janus_cluster that runs here differs from the one that was submitted; None for the same."""
    if (manifest := ManifestRecord.load(bundle.manifest_json)) is None:
        return f"{bundle.manifest_json} does not record the submitted code; the code that runs is {PACKAGE}"
    submitted, now = manifest.code.files, hash_files(read_package())
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
    VersionsRecord(packages=now).write(run.versions_json(attempt))
    for earlier in (number for number in run.attempts() if number < attempt):
        if (before := VersionsRecord.load(run.versions_json(earlier))) is None:
            continue
        changed = _differences(before.packages, now)
        return f"versions changed since attempt {earlier}: {', '.join(changed)}" if changed else None
    return None


def _differences(before: Mapping[str, Any], now: Mapping[str, str | None]) -> list[str]:
    names = [*before, *(name for name in now if name not in before)]
    return [
        f"{name} {before.get(name) or 'none'} → {now.get(name) or 'none'}"
        for name in names
        if before.get(name) != now.get(name)
    ]
