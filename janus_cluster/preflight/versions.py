"""The software that training needs is installed on every node, the same everywhere. Nothing is imported for it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from janus_cluster.preflight.model import CheckResult

PACKAGES = ("janus-cluster", "torch", "transformers", "deepspeed", "pydantic")


def read_versions() -> dict[str, str | None]:
    """Facts: version of Python and of each package; None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def judge_versions(facts: Mapping[str, str | None], *, node: str, python_min: str) -> list[CheckResult]:
    """FAIL where a package is missing or Python is too old."""
    missing = [name for name in PACKAGES if not facts.get(name)]
    python = str(facts["python"])
    too_old = _numbers(python) < _numbers(python_min)
    bad = [f"{name} not installed" for name in missing] + ([f"python {python}"] if too_old else [])
    return [
        CheckResult(
            id="versions",
            phase="static",
            node=node,
            state="FAIL" if bad else "PASS",
            measured=", ".join(bad) or ", ".join(f"{k} {v}" for k, v in facts.items()),
            expected=f"python >= {python_min}; {', '.join(PACKAGES)} installed",
            threshold_source="templates/preflight",
            fix="pip install 'janus-cluster[train]' into environment.python" if bad else "",
        )
    ]


def judge_same_versions(by_node: Mapping[str, Mapping[str, Any]]) -> list[CheckResult]:
    """FAIL for each node that differs from the first one, naming in what."""
    reference_node, reference = next(iter(by_node.items()))
    results = []
    for node, facts in by_node.items():
        differing = [f"{k} {facts.get(k)} ≠ {reference[k]}" for k in reference if facts.get(k) != reference[k]]
        results.append(
            CheckResult(
                id="versions.same",
                phase="cross_node",
                node=node,
                state="FAIL" if differing else "PASS",
                measured=", ".join(differing) or "same",
                expected=f"as on {reference_node}",
                threshold_source="agreement of nodes",
                fix="use one environment for all nodes (environment.python, environment.setup)" if differing else "",
            )
        )
    return results


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
