"""What a site's Slurm offers: partitions with their GPUs and time limits, accounts, what a job may ask of it.

Source: sinfo(1), scontrol(1), sacctmgr(1) of Slurm 22.05.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from janus_cluster.slurm.commands import Slurm

_SEPARATOR = "\x1f"
_SINFO = _SEPARATOR.join(["%P", "%a", "%l", "%D", "%G", "%T"])
_GPU = re.compile(r"gpu(?::(?P<type>[^:,()]+))?:(?P<num>\d+)(?:\([^)]*\))?$")
_CONFIG = re.compile(r"^(\S+)\s*= ?(.*)$", re.MULTILINE)
_UNUSABLE = re.compile("down|drain|fail|unknown")


@dataclass(frozen=True, kw_only=True)
class GpuGres:
    """GPUs of one node as Slurm spells them: gpu:<type>:<num>. type: None where the site gives none."""

    type: str | None
    num: int

    @property
    def spelling(self) -> str:
        return ":".join(filter(None, ["gpu", self.type, str(self.num)]))


@dataclass(kw_only=True)
class Partition:
    """One partition. `nodes` counts, for each kind of GPUs, the nodes that are not down or drained.

    time_limit: as sinfo prints it; "infinite" for none.
    """

    name: str
    is_default: bool
    is_up: bool
    time_limit: str
    nodes: dict[GpuGres, int] = field(default_factory=dict)

    @property
    def gpus(self) -> GpuGres | None:
        """The GPUs of most of its nodes."""
        return max(self.nodes, key=lambda gres: self.nodes[gres], default=None)

    @property
    def num_gpu_nodes(self) -> int:
        return sum(self.nodes.values())


@dataclass(frozen=True, kw_only=True)
class Association:
    """An account that the user may charge, and in which partition; partition: "" for all."""

    account: str
    partition: str
    is_default: bool


def ask_partitions(slurm: Slurm) -> list[Partition]:
    """Every partition that the user sees. Raises: SlurmUnavailable, JanusError."""
    return parse_partitions(slurm.ask(["sinfo", "--noheader", f"--format={_SINFO}"]))


def parse_partitions(text: str) -> list[Partition]:
    """From sinfo's rows, of which a partition has one for each state and kind of node."""
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(_SEPARATOR)]
        if len(cells) != 6:
            continue
        name, available, limit, num, gres, state = cells
        plain = name.removesuffix("*")
        partition = found.setdefault(
            plain,
            Partition(name=plain, is_default=name.endswith("*"), is_up=available == "up", time_limit=limit),
        )
        gpus = parse_gpu_gres(gres)
        if gpus is not None and num.isdigit() and not _UNUSABLE.search(state):
            partition.nodes[gpus] = partition.nodes.get(gpus, 0) + int(num)
    return list(found.values())


def parse_gpu_gres(text: str) -> GpuGres | None:
    """The first kind of GPUs in a node's GRES (`gpu:h800:8(S:0-1),nvme:1`); None for a node without."""
    for part in re.split(r",(?![^(]*\))", text):
        if found := _GPU.match(part.strip()):
            return GpuGres(type=found["type"], num=int(found["num"]))
    return None


def ask_config(slurm: Slurm) -> dict[str, str]:
    """Key → value of the controller's configuration. Raises: SlurmUnavailable, JanusError."""
    return dict(_CONFIG.findall(slurm.ask(["scontrol", "show", "config"])))


def ask_associations(slurm: Slurm, user: str) -> list[Association]:
    """The accounts that the user may charge. Raises: SlurmUnavailable where there is no sacctmgr, JanusError."""
    argv = ["sacctmgr", "--noheader", "--parsable2", "show"]
    printed = slurm.ask([*argv, "associations", f"user={user}", "format=account,partition"])
    default = slurm.ask([*argv, "user", user, "format=defaultaccount"]).strip()
    return parse_associations(printed, default=default)


def parse_associations(text: str, *, default: str) -> list[Association]:
    """From sacctmgr's rows `account|partition`."""
    rows = [line.split("|") for line in text.splitlines() if line.strip()]
    return [
        Association(account=row[0], partition=row[1] if len(row) > 1 else "", is_default=row[0] == default)
        for row in rows
        if row[0]
    ]


def run_on_one_node(slurm: Slurm, options: Sequence[str], argv: Sequence[str], *, wait_s: int) -> str:
    """What the command prints on one node of the site; srun gives up after `wait_s` without a free node.

    Raises: SlurmUnavailable, JanusError.
    """
    fixed = ["srun", "--nodes=1", "--ntasks=1", f"--immediate={wait_s}", "--time=00:05:00", "--job-name=janus-init"]
    return slurm.ask([*fixed, *options, *argv])
