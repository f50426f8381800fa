"""Names and paths of one sandbox, all derived from its folder, so that two sandboxes never meet.

<home>/
  sandbox.json   what runs (state.py)        lock          held while up, down, fault or heal work
  etc/           slurm.conf and companions   secret/       munge key (0700)
  dev/           the pretended GPUs          state/        slurmctld's memory, MariaDB's data
  nodes/<node>/  mnt (its /mnt/node), etc    logs/         <daemon>.log, and .out (what it printed); logs.previous/
<short>/         run/ (sockets, pids) and spool/: <home> itself, or a folder below /tmp where <home> is too long
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from janus_cluster.errors import SandboxFailed

MOST_NODES = 8
DEFAULT_NODES = 2
CONTROLLER = "ctl"
GPUS_PER_NODE = 8
GPU_TYPE = "h800"
CPUS_PER_NODE = 64
NUM_RAILS = 8
PARTITION = "gpu"
NODE_MOUNT = Path("/mnt/node")

# A socket's path has 107 usable bytes; slurmd appends /spool/<node>/<node>_<job id>.<step id>, up to 55 bytes.
_LONGEST_SOCKET_BASE = 50


def node_names(number: int) -> tuple[str, ...]:
    """h800-01, h800-02, …"""
    return tuple(f"h800-{index:02d}" for index in range(1, number + 1))


@dataclass(frozen=True)
class Layout:
    """Every path and name of the sandbox in `home`. Nothing is created by naming it."""

    home: Path

    @property
    def tag(self) -> str:
        """Six hex digits that no other folder (in practice) has; part of namespace and interface names."""
        return hashlib.sha256(os.fsencode(self.home)).hexdigest()[:6]

    @property
    def short(self) -> Path:
        if len(os.fsencode(self.home)) <= _LONGEST_SOCKET_BASE:
            return self.home
        return Path(f"/tmp/janus-sandbox-{self.tag}-{os.getuid()}")

    @property
    def state_json(self) -> Path:
        return self.home / "sandbox.json"

    @property
    def lock(self) -> Path:
        return self.home / "lock"

    @property
    def etc(self) -> Path:
        return self.home / "etc"

    @property
    def slurm_conf(self) -> Path:
        return self.etc / "slurm.conf"

    @property
    def secret(self) -> Path:
        return self.home / "secret"

    @property
    def munge_key(self) -> Path:
        return self.secret / "munge.key"

    @property
    def task_prolog(self) -> Path:
        return self.etc / "task_prolog.sh"

    @property
    def database_init(self) -> Path:
        return self.etc / "database.sql"

    @property
    def devices(self) -> Path:
        return self.home / "dev"

    @property
    def state(self) -> Path:
        return self.home / "state"

    @property
    def logs(self) -> Path:
        return self.home / "logs"

    @property
    def previous_logs(self) -> Path:
        return self.home / "logs.previous"

    @property
    def run(self) -> Path:
        return self.short / "run"

    @property
    def spool(self) -> Path:
        return self.short / "spool"

    @property
    def munge_socket(self) -> Path:
        return self.run / "munge.socket"

    @property
    def database_socket(self) -> Path:
        return self.run / "private" / "mysql.socket"

    def node_dir(self, host: str) -> Path:
        return self.home / "nodes" / host

    def node_mnt(self, node: str) -> Path:
        return self.node_dir(node) / "mnt"

    def node_hidden(self, node: str) -> Path:
        return self.node_dir(node) / "hidden"

    def log(self, daemon: str) -> Path:
        """What the daemon writes itself, with times; not every daemon has one."""
        return self.logs / f"{daemon}.log"

    def output(self, daemon: str) -> Path:
        """What the daemon printed: all there is when it failed before it opened its log."""
        return self.logs / f"{daemon}.out"


def layout_of(home: Path) -> Layout:
    """The layout of a folder that Slurm's configuration can name.

    Raises:  SandboxFailed if the path holds a character that slurm.conf cannot.
    """
    resolved = Path(os.path.expanduser(home)).resolve()
    if not re.fullmatch(r"[\w./+@:~-]+", str(resolved), flags=re.ASCII):
        raise SandboxFailed(
            f"sandbox folder {str(resolved)!r}: slurm.conf can only name paths of ASCII letters, digits and ._/+@:~-",
            hint="set JANUS_HOME to a folder without spaces or special characters",
        )
    return Layout(resolved)
