"""What the lint thinks of the variables that a node really has: the job's own and what its shell brought along."""

from __future__ import annotations

from collections.abc import Mapping

from janus_cluster.config.schema import EnvVar, ResolvedJob
from janus_cluster.preflight.model import Check, CheckResult
from janus_cluster.preflight.sysfs import NodeRoot
from janus_cluster.preflight.versions import numbers, read_versions
from janus_cluster.render.env_lint import lint_env, select_linted

_SHOWN = 3


def judge_environment(
    environ: Mapping[str, str], resolved: ResolvedJob, *, node: str, torch: str | None
) -> list[CheckResult]:
    """WARN with every opinion of the lint on what this node's processes will see. Nothing is changed."""
    by_name = {v.name: v for v in resolved.env}
    env = [
        by_name[name]
        if name in by_name and by_name[name].value == value
        else EnvVar(name=name, value=value, reason="", origin=f"shell of {node}")
        for name, value in environ.items()
    ]
    warnings = lint_env(env, torch_version=numbers(torch)[:2] if torch else None)
    check = Check(
        id="environment", node=node, expected="no doubtful variable", source="janus-cluster preflight --lint-env"
    )
    if not warnings:
        return [check.judged("PASS", f"{len(env)} variables")]
    more = f"; and {len(warnings) - _SHOWN} more" if len(warnings) > _SHOWN else ""
    fix = "janus-cluster preflight --lint-env; the values stand as they are"
    return [check.judged("WARN", "; ".join(warnings[:_SHOWN]) + more, fix=fix)]


def lint_job_and_shell(resolved: ResolvedJob, environ: Mapping[str, str]) -> list[str]:
    """What is doubtful about the variables that the job exports and about those of the shell that submits.

    A variable of the shell that the job sets too is told once, as the job's.
    """
    torch = read_versions(NodeRoot.of(resolved.job.preflight.sysfs_root))["torch"]
    own = {v.name for v in resolved.env}
    shell = [v for v in select_linted(environ, origin="this shell") if v.name not in own]
    return lint_env([*resolved.env, *shell], torch_version=numbers(torch)[:2] if torch else None)
