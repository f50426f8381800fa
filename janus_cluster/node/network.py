"""Variables that this node's ranks get beyond env.sh: from the hardware, and for the probe alone."""

from __future__ import annotations

import os
from typing import Any

from janus_cluster.job.resolved import EnvVar, ResolvedJob
from janus_cluster.node.topology import NodeIdentity
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.gate import FactsRecord

_PROBE = "the preflight's own test"


def network_variables(
    run: RunDir, resolved: ResolvedJob, identity: NodeIdentity, *, attempt: int, master_addr: str
) -> list[EnvVar]:
    """NCCL_IB_HCA, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME of this node; a value set by the user is kept.

    The interface is the one with the route to master_addr; on node 0 the one that has this address.
    """
    from janus_cluster.preflight.hca import read_hcas
    from janus_cluster.preflight.network_env import derive_network_env
    from janus_cluster.preflight.route import read_route
    from janus_cluster.preflight.sysfs import NodeRoot

    root = NodeRoot.of(resolved.job.preflight.sysfs_root)
    record = FactsRecord.load(run.facts_json(attempt, identity.node))
    facts: dict[str, Any] = dict(record.values) if record else {"hca": read_hcas(root)}
    # With one node nothing leaves it, so the interface of the default route is irrelevant.
    facts["route"] = read_route(master_addr, root) if identity.num_nodes > 1 else {}
    return derive_network_env(facts, resolved.preflight_thresholds, os.environ)


def probe_variables(run: RunDir, resolved: ResolvedJob, identity: NodeIdentity, *, attempt: int) -> list[EnvVar]:
    """What the probe needs from NCCL: its log in a file, the ring whose figures are known, an early end."""
    if resolved.job.hardware.device != "cuda":
        return []
    log = str(run.nccl_log_pattern(attempt, identity.node))
    wanted = (
        ("NCCL_DEBUG", "INFO", "The transport is judged by NCCL's own log."),
        ("NCCL_DEBUG_SUBSYS", "INIT,NET,GRAPH,ENV", "No more than the judge reads."),
        ("NCCL_DEBUG_FILE", log, "Apart from the node's log."),
        ("NCCL_ALGO", "Ring", "The floors are of rings; a tree can exceed the wire."),
        ("NCCL_IB_TIMEOUT", "18", "7.5 s with 7 retries: a dead link is found soon."),
    )
    return [EnvVar(name=name, value=value, reason=reason, origin=_PROBE) for name, value, reason in wanted]


def trace_variables(run: RunDir, resolved: ResolvedJob, *, attempt: int) -> list[EnvVar]:
    """Where NCCL's watchdog writes the flight recorder's trace when a collective times out; torch adds the rank.

    The older of its two names, which every supported torch knows. A value set by the user is kept.
    """
    name = "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"
    if resolved.job.hardware.device != "cuda" or {name, "TORCH_FR_DUMP_TEMP_FILE"} & set(os.environ):
        return []
    run.stall(attempt).mkdir(parents=True, exist_ok=True)
    value = str(run.stall_trace_prefix(attempt))
    reason = "The ranks' traces of a time-out are in the run folder, for the failure card and torch's analysis."
    return [EnvVar(name=name, value=value, reason=reason, origin="the attempt")]
