"""SandboxInfo: what is written down of a running sandbox, in <home>/sandbox.json, and read by later commands."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from janus_cluster.run.files import read_json, write_json_atomically
from janus_cluster.sandbox.layout import NODE_MOUNT, layout_of
from janus_cluster.sandbox.programs import search_path

SCHEMA_VERSION = 1
Mode = Literal["namespaces", "plain"]


@dataclass(frozen=True)
class Daemon:
    """One process we started. pid and start_ticks together name it: a reused pid starts at another tick."""

    name: str
    pid: int
    start_ticks: int


@dataclass(frozen=True)
class Node:
    """One pretended host. rails: interface name → address inside the host; empty in plain mode."""

    name: str
    address: str
    port: int
    mnt: str
    rails: dict[str, str] = field(default_factory=dict)
    namespace: str | None = None


@dataclass(frozen=True)
class Network:
    """The namespaces and the one interface that this sandbox has outside of them."""

    subnet: str
    controller_namespace: str
    controller_address: str
    host_interface: str
    host_address: str


@dataclass(frozen=True)
class Fault:
    """One fault in force. detail: rail, rate or path, as the kind needs."""

    kind: str
    node: str
    detail: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SandboxInfo:
    """A sandbox that was started. `env()` is all that sbatch, squeue and srun need to reach it."""

    home: str
    mode: Mode
    slurm_conf: str
    boot_id: str
    accounting: bool
    controller_port: int
    nodes: tuple[Node, ...]
    complete: bool = False
    accounting_port: int | None = None
    # What `slurmctld -V` printed, and the prefix of that Slurm; None where the system's own programs are it.
    slurm_version: str = ""
    slurm_root: str | None = None
    network: Network | None = None
    daemons: tuple[Daemon, ...] = ()
    faults: tuple[Fault, ...] = ()

    def env(self) -> dict[str, str]:
        """Variables to add to the environment of any Slurm command; PATH where the Slurm is not the system's."""
        path = {"PATH": search_path(root=self.slurm_root)} if self.slurm_root else {}
        return {"SLURM_CONF": self.slurm_conf, **path}

    @property
    def node_names(self) -> tuple[str, ...]:
        return tuple(node.name for node in self.nodes)

    def node(self, name: str) -> Node | None:
        """The node of that name, or None."""
        return next((n for n in self.nodes if n.name == name), None)

    def daemon(self, name: str) -> Daemon | None:
        """The daemon of that name, or None if it was never started or was stopped on purpose."""
        return next((d for d in self.daemons if d.name == name), None)

    def with_daemon(self, daemon: Daemon) -> SandboxInfo:
        """A copy that has `daemon` in place of any of the same name."""
        kept = tuple(d for d in self.daemons if d.name != daemon.name)
        return replace(self, daemons=(*kept, daemon))

    def host_path(self, node: str, path: str) -> Path | None:
        """This machine's path of a path below /mnt/node of that node; None if it is not below it."""
        found = self.node(node)
        if found is None or not Path(path).is_relative_to(NODE_MOUNT):
            return None
        return Path(found.mnt) / Path(path).relative_to(NODE_MOUNT)


@dataclass(frozen=True)
class SandboxStatus:
    """What `sandbox status` shows.

    state:  down      nothing runs
            running   every daemon runs, or is stopped by a fault in force
            degraded  some daemon is gone although no fault stopped it
            stale     all processes of sandbox.json are gone (the machine was restarted)
    nodes:  node name → its state as Slurm names it ("idle", "down*", "unknown" when slurmctld does not answer)
    """

    state: Literal["down", "running", "degraded", "stale"]
    home: str
    mode: Mode | None = None
    slurm_conf: str | None = None
    slurm_version: str | None = None
    slurm_root: str | None = None
    accounting: bool = False
    nodes: dict[str, str] = field(default_factory=dict)
    daemons: dict[str, bool] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The contract of `sandbox status --json`."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


def load_info(home: Path) -> SandboxInfo | None:
    """The content of sandbox.json, whether or not it still runs; None if there is none that this version can read."""
    try:
        return parse_info(read_json(layout_of(home).state_json))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def parse_info(value: Any) -> SandboxInfo:
    """SandboxInfo from its JSON value. Raises: ValueError, KeyError, TypeError if it is of another shape or version."""
    fields = dict(value)
    if fields.pop("schema_version", None) != SCHEMA_VERSION:
        raise ValueError("sandbox.json is of another version")
    fields["nodes"] = tuple(Node(**n) for n in fields["nodes"])
    fields["daemons"] = tuple(Daemon(**d) for d in fields["daemons"])
    fields["faults"] = tuple(Fault(**f) for f in fields["faults"])
    fields["network"] = Network(**fields["network"]) if fields["network"] else None
    return SandboxInfo(**fields)


def write_info(info: SandboxInfo) -> None:
    """<home>/sandbox.json holds `info`."""
    value = {"schema_version": SCHEMA_VERSION, **asdict(info)}
    write_json_atomically(layout_of(Path(info.home)).state_json, value)
