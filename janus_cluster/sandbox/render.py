"""The text of slurm.conf, its companions and a host's /etc/hosts. Pure, but for reading the templates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from janus_cluster.job.resources import templates_dir
from janus_cluster.job.templates import template_environment
from janus_cluster.sandbox import layout as names
from janus_cluster.sandbox.layout import Layout
from janus_cluster.sandbox.state import SandboxInfo
from janus_cluster.sandbox.versions import MESSAGE_TIMEOUT_S, settings_of

CLUSTER_NAME = "janus_sandbox"
DATABASE_NAME = "slurm_acct"


def render_template(name: str, **values: Any) -> str:
    """templates/sandbox/<name> filled in. Raises: jinja2.UndefinedError if it names a value that is not given."""
    return template_environment(templates_dir() / "sandbox").get_template(name).render(**values)


def render_slurm_conf(
    layout: Layout,
    info: SandboxInfo,
    *,
    user: str,
    controller_host: str,
    real_memory_mb: int,
    loopback_only: bool,
) -> str:
    """slurm.conf for all nodes. In plain mode all have this machine's host name and differ by port only.

    loopback_only: the daemons listen at the address of their host name, which must then be 127.0.0.1.
    """
    plain = info.mode == "plain"
    nodes = [
        {"name": n.name, "hostname": controller_host if plain else n.name, "address": n.address, "port": n.port}
        for n in info.nodes
    ]
    return render_template(
        "slurm.conf.j2",
        cluster_name=CLUSTER_NAME,
        controller_host=controller_host,
        controller_address=controller_address(info),
        controller_port=info.controller_port,
        user=user,
        munge_socket=layout.munge_socket,
        loopback_only=loopback_only,
        state_dir=layout.state / "slurmctld",
        spool_dir=layout.spool,
        pid_dir=layout.run,
        log_dir=layout.logs,
        task_prolog=layout.task_prolog if info.slurm_root else None,
        message_timeout_s=MESSAGE_TIMEOUT_S,
        unkillable_step_timeout_s=settings_of(info.slurm_version).unkillable_step_timeout_s,
        accounting_port=info.accounting_port,
        nodes=nodes,
        cpus=names.CPUS_PER_NODE,
        real_memory_mb=real_memory_mb,
        gpu_type=names.GPU_TYPE,
        gpus_per_node=names.GPUS_PER_NODE,
        partition=names.PARTITION,
    )


def render_gres_conf(layout: Layout, info: SandboxInfo) -> str:
    """gres.conf: eight pretended GPUs on each node. `Count=` without `File=` would drain the node."""
    return render_template(
        "gres.conf.j2",
        nodes=info.nodes,
        gpu_type=names.GPU_TYPE,
        gpus_per_node=names.GPUS_PER_NODE,
        device_dir=layout.devices,
    )


def render_cgroup_conf(info: SandboxInfo) -> str:
    """cgroup.conf with a plugin that starts without a mounted cgroup tree."""
    return render_template("cgroup.conf.j2", cgroup_plugin=settings_of(info.slurm_version).cgroup_plugin)


def render_task_prolog(slurm_root: str) -> str:
    """The script that puts that Slurm's programs on the PATH of every job and step, whatever environment it has."""
    return f'#!/bin/sh\necho "export PATH={slurm_root}/bin:{slurm_root}/sbin:$PATH"\n'


def render_slurmdbd_conf(layout: Layout, info: SandboxInfo, *, user: str, controller_host: str) -> str:
    """slurmdbd.conf for the private MariaDB, which it reaches by MYSQL_UNIX_PORT (see accounting.py)."""
    return render_template(
        "slurmdbd.conf.j2",
        munge_socket=layout.munge_socket,
        controller_host=controller_host,
        controller_address=controller_address(info),
        accounting_port=info.accounting_port,
        user=user,
        database_user=user,
        database_name=DATABASE_NAME,
        log_dir=layout.logs,
        pid_dir=layout.run,
    )


def render_hosts(entries: Sequence[tuple[str, str]]) -> str:
    """An /etc/hosts of (address, name) pairs, loopback first."""
    lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost", *(f"{address} {name}" for address, name in entries)]
    return "\n".join(lines) + "\n"


def controller_address(info: SandboxInfo) -> str:
    """Where slurmctld and slurmdbd listen."""
    return info.network.controller_address if info.network else "127.0.0.1"
