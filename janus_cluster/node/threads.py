"""OMP_NUM_THREADS of a node's ranks, where the node gives the job fewer CPUs than the profile's threads would take."""

from __future__ import annotations

from collections.abc import Mapping

from janus_cluster.job.resolved import EnvVar, ResolvedJob
from janus_cluster.preflight.cpus import read_cpus, usable_cpus
from janus_cluster.preflight.sysfs import NodeRoot
from janus_cluster.run.text import counted

_NAME = "OMP_NUM_THREADS"


def thread_variables(resolved: ResolvedJob, environ: Mapping[str, str]) -> list[EnvVar]:
    """The profile's number of threads lowered to this node's CPUs per rank; a value set by the user is kept."""
    planned = next((var for var in resolved.env if var.name == _NAME), None)
    is_of_profile = planned is not None and not planned.origin.startswith("environment.")
    if planned is None or not is_of_profile or environ.get(_NAME) != planned.value or not planned.value.isdecimal():
        return []
    usable = usable_cpus(read_cpus(NodeRoot.of(resolved.job.preflight.sysfs_root)))
    share = max(1, int(usable) // resolved.processes_per_node)
    if share >= int(planned.value):
        return []
    reason = (
        f"Lowered from {planned.value}: {counted(usable, 'CPU')} for {counted(resolved.processes_per_node, 'rank')}."
    )
    return [EnvVar(name=_NAME, value=str(share), reason=reason, origin="this node's CPUs")]
