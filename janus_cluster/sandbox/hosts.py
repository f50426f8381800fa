"""Starting the pretended hosts and the daemons on them, in either mode. Every start is written down at once."""

from __future__ import annotations

import os
import pwd
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from janus_cluster.errors import SandboxFailed
from janus_cluster.job.resources import templates_dir
from janus_cluster.sandbox.daemons import is_alive, read_command_name, start_daemon, tail
from janus_cluster.sandbox.layout import CONTROLLER, NODE_MOUNT, Layout
from janus_cluster.sandbox.programs import find_program, run_program, search_path
from janus_cluster.sandbox.render import render_hosts
from janus_cluster.sandbox.state import Daemon, SandboxInfo, write_info

MUNGED = "munged"
SLURMCTLD = "slurmctld"
_START_LIMIT_S = 10


def slurmd_name(node: str) -> str:
    """The daemon name of a node's slurmd."""
    return f"slurmd-{node}"


def holder_name(host: str) -> str:
    """The daemon name of the process that holds a host's namespaces open."""
    return f"host-{host}"


def is_holder(daemon: Daemon) -> bool:
    """Whether it is such a process, without which nothing can be started on that host any more."""
    return daemon.name.startswith("host-")


class Starter:
    """Starts daemons on hosts; `info` always equals sandbox.json."""

    def __init__(self, layout: Layout, info: SandboxInfo) -> None:
        self.layout = layout
        self.info = info

    def remember(self, info: SandboxInfo) -> None:
        """`info` is ours and on disk."""
        self.info = info
        write_info(info)

    def start(
        self, name: str, argv: Sequence[str], env: dict[str, str] | None = None, *, host: str | None = None
    ) -> Daemon:
        """The daemon runs on that host (in plain mode: on this machine) and is written down."""
        full = [*self._on_host(host), self._program(argv[0]), *argv[1:]]
        clean = _clean_environment(self.info.slurm_root)
        environment = {**clean, "SLURM_CONF": self.info.slurm_conf, **(env or {})}
        daemon = start_daemon(name, full, env=environment, cwd=self.layout.home, output=self.layout.output(name))
        self.remember(self.info.with_daemon(daemon))
        return daemon

    def start_on_controller(self, name: str, argv: Sequence[str], env: dict[str, str]) -> Daemon:
        """The daemon runs where slurmctld does."""
        return self.start(name, argv, env, host=CONTROLLER)

    def start_hosts(self) -> None:
        """Every host of namespaces mode is booted: own host name, hosts file, /dev/shm and /mnt/node."""
        network = self.info.network
        if network is None:
            return
        # A mount needs a mount point. It stays after `down`: removing it would take another sandbox's mount away.
        NODE_MOUNT.mkdir(parents=True, exist_ok=True)
        self._start_holder(CONTROLLER, network.controller_namespace, mnt="-")
        for node in self.info.nodes:
            self._start_holder(node.name, str(node.namespace), mnt=node.mnt)
        for host in (CONTROLLER, *(n.name for n in self.info.nodes)):
            self._wait_for_boot(host)

    def start_munged(self) -> None:
        """munged answers on the sandbox's own socket."""
        layout = self.layout
        options = [
            f"--socket={layout.munge_socket}",
            f"--key-file={layout.munge_key}",
            f"--pid-file={layout.run / 'munged.pid'}",
            f"--seed-file={layout.secret / 'munged.seed'}",
        ]
        # --force: munged refuses folders with a group-writable parent, which home folders on clusters often have.
        daemon = self.start(MUNGED, ["munged", "--foreground", "--force", *options], host=CONTROLLER)
        self.wait_for(daemon, layout.munge_socket)

    def start_slurmctld(self) -> None:
        """slurmctld was started; the caller waits for idle nodes to see that it answers."""
        self.start(SLURMCTLD, ["slurmctld", "-D"], host=CONTROLLER)

    def start_slurmd(self, node: str) -> None:
        """That node's slurmd was started."""
        (self.layout.spool / node).mkdir(mode=0o755, exist_ok=True)
        self.start(slurmd_name(node), [*_unlimited(), self._program("slurmd"), "-D", "-N", node], host=node)

    def wait_for_slurmd(self, name: str) -> None:
        """That node's slurmd takes connections. Raises: SandboxFailed if it ends or takes longer than 10 s."""
        node, daemon = self.info.node(name), self.info.daemon(slurmd_name(name))
        deadline = time.monotonic() + _START_LIMIT_S
        while node is not None and daemon is not None:
            with socket.socket() as s:
                s.settimeout(1)
                if s.connect_ex((node.address, node.port)) == 0:
                    return
            if not is_alive(daemon) or time.monotonic() > deadline:
                raise SandboxFailed(f"{daemon.name} did not start:\n{tail(self.layout.log(daemon.name))}")
            time.sleep(0.02)

    def wait_for(self, daemon: Daemon, path: Path) -> None:
        """`path` exists. Raises: SandboxFailed if the daemon ends or takes longer than 10 s."""
        deadline = time.monotonic() + _START_LIMIT_S
        while not path.exists():
            if not is_alive(daemon) or time.monotonic() > deadline:
                raise SandboxFailed(f"{daemon.name} did not start:\n{tail(self.layout.log(daemon.name))}")
            time.sleep(0.01)

    def _program(self, name: str) -> str:
        return find_program(name, path=search_path(root=self.info.slurm_root))

    def _on_host(self, host: str | None) -> list[str]:
        if host is None or self.info.network is None:
            return []
        holder = self.info.daemon(holder_name(host))
        if holder is None or not is_alive(holder):
            raise SandboxFailed(f"host {host} is gone", hint="janus-cluster sandbox down, then up")
        return ["nsenter", f"--target={holder.pid}", "--net", "--uts", "--mount", "--"]

    def _start_holder(self, host: str, namespace: str, *, mnt: str) -> None:
        etc = self.layout.node_dir(host) / "etc"
        (etc / "cgroup").mkdir(parents=True, exist_ok=True)
        (etc / "hosts").write_text(render_hosts(self._addresses(host)), encoding="ascii")
        (etc / "resolv.conf").write_text("", encoding="ascii")
        boot = ["sh", str(templates_dir() / "sandbox" / "boot_host.sh"), host, str(etc), mnt]
        self.start(
            holder_name(host), ["nsenter", f"--net=/run/netns/{namespace}", "unshare", "--uts", "--mount", *boot]
        )

    def _addresses(self, host: str) -> list[tuple[str, str]]:
        network = self.info.network
        entries = [(n.address, n.name) for n in self.info.nodes]
        if network is not None:
            entries.append((network.controller_address, CONTROLLER))
            entries.append((network.host_address, socket.gethostname()))
        return entries

    def _wait_for_boot(self, host: str) -> None:
        daemon = self.info.daemon(holder_name(host))
        deadline = time.monotonic() + _START_LIMIT_S
        # boot_host.sh ends by becoming `sleep`.
        while daemon is not None and read_command_name(daemon.pid) != "sleep":
            if not is_alive(daemon) or time.monotonic() > deadline:
                raise SandboxFailed(f"host {host} did not boot:\n{tail(self.layout.output(daemon.name))}")
            time.sleep(0.01)


def without_daemon(info: SandboxInfo, name: str) -> SandboxInfo:
    """A copy that does not list the daemon of that name."""
    return replace(info, daemons=tuple(d for d in info.daemons if d.name != name))


def _clean_environment(slurm_root: str | None) -> dict[str, str]:
    """What an init system would give a daemon: nothing of the caller's secrets reaches slurmd and its jobs."""
    user = pwd.getpwuid(os.getuid())
    path = search_path({"PATH": "/usr/local/bin:/usr/bin:/bin"}, root=slurm_root)
    return {"PATH": path, "HOME": user.pw_dir, "LANG": "C.UTF-8"}


def _unlimited() -> list[str]:
    """A prefix that lets slurmd and its jobs lock memory without limit, as slurmd.service does; [] if we may not."""
    prefix = ["prlimit", "--memlock=unlimited"]
    return prefix if run_program([*prefix, "true"]).returncode == 0 else []
