"""The probe between two readings of the error counters: the difference is due to our own traffic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from janus_cluster.node.child import exit_code, start_child
from janus_cluster.preflight.gpu_load import GpuSampler
from janus_cluster.run.records.gate import CountersRecord


def run_between_counters(
    command: Sequence[str],
    environ: Mapping[str, str],
    path: Path,
    *,
    sysfs_root: str | None,
    gpu_timeout_s: float | None = None,
) -> int:
    """Run the command and write {before, after, gpu_load} to `path`.

    gpu_timeout_s: limit of one query of nvidia-smi, which is sampled meanwhile; None: it is not run.
    Returns:       the command's exit code, 128 + n for signal n.
    """
    before = read_all_counters(sysfs_root)
    process = start_child(command, environ)
    gpu_load: list[dict[str, Any]] | None = None
    if gpu_timeout_s is None:
        code = process.wait()
    else:
        with GpuSampler(timeout_s=gpu_timeout_s) as sampler:
            code = process.wait()
        gpu_load = sampler.samples
    after = read_all_counters(sysfs_root)
    load = None if gpu_load is None else tuple(gpu_load)
    CountersRecord(before=before, after=after, gpu_load=load).write(path)
    return exit_code(code)


def read_all_counters(sysfs_root: str | None) -> dict[str, Any]:
    """Error counters of every HCA port and of every interface with an address."""
    from janus_cluster.preflight.hca import read_counters
    from janus_cluster.preflight.interfaces import read_interface_counters, read_interfaces
    from janus_cluster.preflight.sysfs import NodeRoot

    counters: dict[str, Any] = dict(read_counters(NodeRoot.of(sysfs_root)))
    of_interfaces = read_interface_counters()
    return counters | {i["name"]: of_interfaces.get(i["name"], {}) for i in read_interfaces()}
