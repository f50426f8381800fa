"""CPUs that this process may use on the node: its affinity and the quota of its cgroup, against what the ranks need."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.preflight.model import Check
from janus_cluster.preflight.sysfs import NodeRoot, read_cgroup_files
from janus_cluster.run.records.verdict import CheckResult, State


def read_cpus(root: NodeRoot) -> dict[str, Any]:
    """Facts: CPUs of the node (`online`), of the affinity (`allowed`), of the cgroup's quota (None: no quota).

    Slurm binds a job to what it asked for by affinity or cpuset; a container has a quota instead.
    """
    return {"online": os.cpu_count(), "allowed": len(os.sched_getaffinity(0)), "quota": _read_quota(root)}


def usable_cpus(fact: Mapping[str, Any]) -> float:
    """The lesser of affinity and quota."""
    quota = fact["quota"]
    return float(fact["allowed"]) if quota is None else min(float(fact["allowed"]), float(quota))


def judge_cpus(fact: Mapping[str, Any], resolved: ResolvedJob, *, node: str) -> CheckResult:
    """WARN for fewer CPUs than ranks and data workers; FAIL where a training job was given fewer than its ranks.

    A node that has no more, and a gate without training, are a WARN.
    """
    ranks, workers = resolved.processes_per_node, resolved.job.data.num_workers
    needed, usable = ranks * (1 + workers), usable_cpus(fact)
    check = Check(
        id="limits.cpus",
        node=node,
        expected=f"{needed} CPUs: {ranks} ranks with {workers} data workers each; fail below {ranks}",
        source="hardware.processes_per_node, data.num_workers",
    )
    measured = f"{usable:g} of the node's {fact['online']} CPUs"
    if usable >= needed:
        return check.judged("PASS", measured)
    is_limited = usable < (fact["online"] or 0)
    state: State = "FAIL" if usable < ranks and is_limited and resolved.job.kind == "train" else "WARN"
    fix = (
        f"ask Slurm for them: --set slurm.cpus-per-task={needed}, or a whole node (leave slurm.exclusive out)"
        if is_limited
        else "--set data.num_workers=… lower: the node has no more CPUs"
    )
    return check.judged(state, measured, fix=fix, blames_node=False)


def _read_quota(root: NodeRoot) -> float | None:
    """CPUs' worth of time that the cgroup, or the least of those above it, may use."""
    found = [text.split() for text in read_cgroup_files(root, "cpu", v1="cpu.cfs_quota_us", v2="cpu.max")]
    limits = []
    for quota, *period in found:
        # Version 1 has the period in a file of its own; 100 ms is the kernel's default, which Slurm does not change.
        microseconds = period[0] if period else "100000"
        if quota.isdecimal() and microseconds.isdecimal() and int(microseconds):
            limits.append(int(quota) / int(microseconds))
    return min(limits, default=None)
