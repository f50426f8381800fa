"""Facts of one node, without a judgement: facts.<node>.json."""

from __future__ import annotations

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from janus_cluster.job.env_lint import select_linted
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.preflight.agreement import collect_agreement
from janus_cluster.preflight.cpus import read_cpus
from janus_cluster.preflight.gpu_processes import with_owners
from janus_cluster.preflight.gpu_query import read_gpu_tables
from janus_cluster.preflight.hca import INFINIBAND, read_hcas, read_peermem
from janus_cluster.preflight.ibstat import read_ibstat, read_verbs
from janus_cluster.preflight.interfaces import read_interface_names
from janus_cluster.preflight.limits import read_limits
from janus_cluster.preflight.paths import read_paths
from janus_cluster.preflight.pcie import read_pcie
from janus_cluster.preflight.route import read_route
from janus_cluster.preflight.sysfs import NodeRoot
from janus_cluster.preflight.temporary import read_temporary
from janus_cluster.preflight.versions import read_versions
from janus_cluster.preflight.xid import read_kernel_log


def read_facts(resolved: ResolvedJob, *, node: str, peer: str | None = None) -> dict[str, Any]:
    """Facts of this node, read in seconds. Nothing is sent, and only the run folder is written to.

    Only what the profile requires is read: a profile without GPUs starts no nvidia-smi.
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
            "cpus": pool.submit(read_cpus, root),
            "temporary": pool.submit(read_temporary, os.environ),
            "route": pool.submit(read_route, peer, root),
        }
        if profile["gpu"]["wanted"]:
            # A job that computes on CPUs hides the GPUs from CUDA on purpose.
            hidden = {"CUDA_VISIBLE_DEVICES"} if resolved.job.hardware.device == "cpu" else set()
            environ = {name: value for name, value in os.environ.items() if name not in hidden}
            asked["gpu"] = pool.submit(read_gpu_tables, timeout_s=timeout_s, environ=environ)
            asked["kernel_log"] = pool.submit(read_kernel_log, timeout_s=timeout_s)
        if profile["hca"]["wanted"]:
            asked["hca"] = pool.submit(read_hcas, root)
            asked["ibstat"] = pool.submit(read_ibstat, timeout_s=timeout_s)
            asked["verbs"] = pool.submit(read_verbs, timeout_s=timeout_s)
            asked["peermem"] = pool.submit(read_peermem, root)
            asked["pcie"] = pool.submit(read_pcie, root, timeout_s=timeout_s)
        elif profile["gpu"]["wanted"]:
            # Only to name the kind of site.
            asked["unused_hca"] = pool.submit(read_hcas, root)
        facts |= {name: future.result() for name, future in asked.items()}
    if "gpu" in facts:
        facts["gpu"]["processes"] = with_owners(facts["gpu"]["processes"], root)
    facts["interface_names"] = read_interface_names(root)
    facts["environ"] = {v.name: v.value for v in select_linted(os.environ, origin="")}
    facts["agreement"] = collect_agreement(
        facts,
        link_layer=profile["hca"].get("link_layer", INFINIBAND),
        most_rails=resolved.job.hardware.gpus_per_node,
    )
    facts["duration_s"] = time.monotonic() - begun
    return facts
