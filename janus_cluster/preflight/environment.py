"""Lint the variables that a node really has: the job's own and those of its shell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from janus_cluster.job.env_lint import lint_env, select_linted
from janus_cluster.job.resolved import EnvVar, ResolvedJob
from janus_cluster.preflight.hca import parse_nccl_list
from janus_cluster.preflight.model import Check
from janus_cluster.preflight.sysfs import NodeRoot
from janus_cluster.preflight.versions import numbers, read_versions
from janus_cluster.run.records.verdict import CheckResult, join_few


def judge_environment(
    environ: Mapping[str, str],
    resolved: ResolvedJob,
    *,
    node: str,
    torch: str | None,
    interfaces: Sequence[str],
    unset: Sequence[str] = (),
) -> list[CheckResult]:
    """WARN with every warning of the lint on what this node's processes will see; nothing is changed.

    FAIL for the name of an interface that this node does not have: NCCL and gloo end at their first connection; and
    for a variable of the job that refers to one that this node does not have (`unset`).
    """
    by_name = {v.name: v for v in resolved.env}
    env = [
        by_name[name]
        if name in by_name and by_name[name].value == value
        else EnvVar(name=name, value=value, reason="", origin=f"shell of {node}")
        for name, value in environ.items()
    ]
    absent = find_absent_interfaces(environ, interfaces)
    warnings = lint_env(env, torch_version=numbers(torch)[:2] if torch else None)
    check = Check(
        id="environment", node=node, expected="no doubtful variable", source="janus-cluster preflight --lint-env"
    )
    if unset:
        fix = f"on {node}: set it in environment.setup or environment.setup_each_node, or write another value"
        return [check.judged("FAIL", join_few(unset), fix=fix, blames_node=False)]
    if absent:
        fix = f"on {node}: ip -br link; leave the variable unset: the interface of the route to the peer is found"
        return [check.judged("FAIL", join_few([*absent, *warnings]), fix=fix, blames_node=False)]
    if not warnings:
        return [check.judged("PASS", f"{len(env)} variables")]
    fix = "janus-cluster preflight --lint-env; no value was changed"
    return [check.judged("WARN", join_few(warnings), fix=fix)]


def find_absent_interfaces(environ: Mapping[str, str], interfaces: Sequence[str]) -> list[str]:
    """Variables that leave NCCL or gloo without an interface. NCCL needs one of its list, gloo each name of its own."""
    found = []
    nccl, gloo = environ.get("NCCL_SOCKET_IFNAME", ""), environ.get("GLOO_SOCKET_IFNAME", "")
    chosen = parse_nccl_list(nccl)
    there = ", ".join(interfaces)
    if chosen is not None and not any(chosen.takes(name) for name in interfaces):
        found.append(f"NCCL_SOCKET_IFNAME={nccl}: no such interface here ({there})")
    absent = [name for name in gloo.split(",") if name and name not in interfaces]
    if absent:
        found.append(f"GLOO_SOCKET_IFNAME={gloo}: no interface {', '.join(absent)} here ({there})")
    return found


def lint_job_and_shell(resolved: ResolvedJob, environ: Mapping[str, str]) -> list[str]:
    """What is doubtful about the variables that the job exports and about those of the shell that submits.

    A variable of the shell that the job sets too is listed once, as the job's.
    """
    torch = read_versions(NodeRoot.of(resolved.job.preflight.sysfs_root))["torch"]
    own = {v.name for v in resolved.env}
    shell = [v for v in select_linted(environ, origin="this shell") if v.name not in own]
    return lint_env([*resolved.env, *shell], torch_version=numbers(torch)[:2] if torch else None)
