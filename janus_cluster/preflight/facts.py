"""Everything that one node can say about itself, without a judgement: facts.<node>.json."""

from __future__ import annotations

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from janus_cluster.config.schema import ResolvedJob
from janus_cluster.preflight.agreement import collect_agreement
from janus_cluster.preflight.gpu_query import read_gpu_tables
from janus_cluster.preflight.hca import read_hcas, read_peermem
from janus_cluster.preflight.ibstat import read_ibstat, read_verbs
from janus_cluster.preflight.limits import read_limits
from janus_cluster.preflight.paths import read_paths
from janus_cluster.preflight.route import read_route
from janus_cluster.preflight.sysfs import NodeRoot
from janus_cluster.preflight.temporary import read_temporary
from janus_cluster.preflight.versions import read_versions
from janus_cluster.preflight.xid import read_kernel_log
from janus_cluster.render.env_lint import select_linted


def read_facts(resolved: ResolvedJob, *, node: str, peer: str | None = None) -> dict[str, Any]:
    """What this node is. Seconds; nothing leaves the node, and only the run folder is written to.

    What the profile does not want is not asked for: on a rehearsal without GPUs no nvidia-smi is started.
    """
    begun = time.monotonic()
    gate, profile = resolved.job.preflight, resolved.preflight_thresholds
    root, timeout_s = NodeRoot.of(gate.sysfs_root), gate.command_timeout_s
    facts: dict[str, Any] = {
        "schema_version": 1,
        "node": node,
        "hostname": socket.gethostname(),
        "config_hash": resolved.config_hash,
        "time": time.time(),
        "clock": {"time_s": time.time()},
    }
    with ThreadPoolExecutor(max_workers=8) as pool:
        asked: dict[str, Any] = {
            "paths": pool.submit(read_paths, resolved.job, Path(resolved.run_dir)),
            "versions": pool.submit(read_versions, root),
            "limits": pool.submit(read_limits, root),
            "temporary": pool.submit(read_temporary, os.environ),
            "route": pool.submit(read_route, peer, root),
        }
        if profile["gpu"]["wanted"]:
            asked["gpu"] = pool.submit(read_gpu_tables, timeout_s=timeout_s)
            asked["kernel_log"] = pool.submit(read_kernel_log, timeout_s=timeout_s)
        if profile["hca"]["wanted"]:
            asked["hca"] = pool.submit(read_hcas, root)
            asked["ibstat"] = pool.submit(read_ibstat, timeout_s=timeout_s)
            asked["verbs"] = pool.submit(read_verbs, timeout_s=timeout_s)
            asked["peermem"] = pool.submit(read_peermem, root)
        facts |= {name: future.result() for name, future in asked.items()}
    facts["environ"] = {v.name: v.value for v in select_linted(os.environ, origin="")}
    facts["agreement"] = collect_agreement(facts)
    facts["duration_s"] = time.monotonic() - begun
    return facts
