"""The fault matrix as a table: how each fault is made, and the gate's expected result."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from node_faults import FAULTS, HANGS
from node_fixtures import sound_packages

HERE, GOOD, BAD = "local-01", "h800-01", "h800-02"
PAIR = f"{GOOD},{BAD}"


@dataclass(frozen=True, kw_only=True)
class Found:
    """The expected result. `also` are the checks that see the same fault; no other may be other than PASS."""

    check: str
    word: str
    state: str = "FAIL"
    node: str = BAD
    also: tuple[str, ...] = ()
    is_of_site: bool = False

    @property
    def excluded(self) -> list[str]:
        """Nodes of a pair are not distinguished; a fault of all nodes is the job's, so another node would not help."""
        is_blamed = self.state == "FAIL" and self.node in (BAD, HERE) and not self.is_of_site
        return [self.node] if is_blamed else []


@dataclass(frozen=True, kw_only=True)
class Case:
    """What makes the fault, and what is then found: by the job, and on this host alone (a str: why it cannot be).

    lines:         shell, among the mounts of the node that has the fault; the last word is what is mounted over
    tree:          how the pretended node BAD_NODE differs from the sound one
    memlock_bytes: the soft limit of that node's slurmd, or both limits of this host's shell
    runs_size:     the run folders are on a tmpfs of this size, which all nodes share
    blocked_ports: TCP to these ports does not leave the node
    """

    job: Found
    local: Found | str | None = None
    lines: str = ""
    tree: dict[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    memlock_bytes: int | None = None
    runs_size: str | None = None
    blocked_ports: str | None = None

    @property
    def found_locally(self) -> Found | str:
        """As by the job, but for the name of the node and what only two nodes can show."""
        if self.local is not None:
            return self.local
        also = tuple(check for check in self.job.also if not check.startswith("same."))
        return replace(self.job, node=HERE, also=also)


def hardware(name: str, *also: str) -> Case:
    """The fault of that name in node_faults.FAULTS."""
    tree, check, state, word = FAULTS[name]
    found = Found(check=check, state=state, word=word, also=also)
    return Case(tree=tree, lines="mount --bind $BAD_NODE $NODE", job=found)


RAILS = ("hca.ibstat", "same.hcas")

CASES: dict[str, Case] = {
    "HCA down": hardware("rail down", *RAILS),
    "half rate": hardware("rail at half rate", *RAILS),
    "one rail missing": hardware("one rail missing", *RAILS),
    # Alone it may be the site's kind; beside a node with InfiniBand it is this node's fault.
    "RoCE instead of IB": replace(
        hardware("RoCE instead of InfiniBand", "same.hcas"),
        local=Found(check="site.kind", word="RoCE", node=HERE, is_of_site=True),
    ),
    "ibpanic": hardware("ibpanic after valid blocks"),
    "lost GPU": hardware("lost GPU", "same.gpus"),
    "ECC": hardware("ECC"),
    "throttle": hardware("thermal throttle"),
    "wrong SKU": replace(
        hardware("wrong SKU", "same.gpus"),
        local=Found(check="gpu.model", word="NVIDIA H800 PCIe", node=HERE, is_of_site=True),
    ),
    "7 of 8 GPUs": hardware("7 of 8 GPUs", "same.gpus"),
    "hung nvidia-smi": Case(
        tree={"programs": {"nvidia-smi": HANGS["sleeps"]}},
        lines="mount --bind $BAD_NODE $NODE",
        job=Found(
            check="gpu.count",
            state="ERROR",
            word="nvidia-smi did not answer within 2 s",
        ),
    ),
    "missing shard": Case(
        lines="mount --bind $WITHOUT_SHARD $MODEL",
        job=Found(check="paths.model", word="model-00002-of-00002.safetensors", also=("same.files",)),
    ),
    "truncated safetensors": Case(
        lines="mount --bind $CUT_MODEL $MODEL",
        job=Found(check="paths.model", word="truncated", also=("same.files",)),
    ),
    "read-only output": Case(
        lines="mount --bind $RUNS $RUNS; mount -o remount,ro,bind $RUNS",
        job=Found(check="paths.output", word="Read-only file system", also=("reported",)),
        local="refused before there is a run",
    ),
    "full disk": Case(
        # The probe file alone takes 1 MB.
        runs_size="1m",
        options=("environment.code=installed",),
        job=Found(check="paths.output", word="no space left", node="both"),
    ),
    "small /dev/shm": Case(
        lines="mount -t tmpfs -o size=64m tmpfs /dev/shm",
        job=Found(check="limits.shm", word="64 MiB", also=("limits.shm_free",)),
    ),
    "low memlock": Case(
        memlock_bytes=65536,
        job=Found(check="limits.memlock", word="64 KiB"),
        # Alone it may be the limit of the shell, which Slurm hands down to every node.
        local=Found(check="limits.memlock", word="64 KiB", node=HERE, is_of_site=True),
    ),
    "blocked master port": Case(
        # Every port that a rendezvous may get.
        blocked_ports="15000-31000",
        job=Found(check="master_port", node=PAIR, word="h800-02 to h800-01:"),
        local="one host connects to no other",
    ),
    "other versions on node 2": Case(
        tree={"packages": sound_packages() | {"transformers": "5.99.0"}},
        lines="mount --bind $BAD_NODE $NODE",
        job=Found(check="versions.same", word="transformers 5.99.0 ≠"),
        local="one host differs from no other; what it has is judged by the range",
    ),
    "versions out of range": Case(
        tree={"packages": sound_packages() | {"transformers": "4.57.0"}},
        lines="mount --bind $BAD_NODE $NODE",
        job=Found(check="versions", word="transformers 4.57.0 < 5.23", also=("versions.same",)),
        local=Found(check="versions", word="transformers 4.57.0 < 5.23", node=HERE),
    ),
    "clock skew": Case(
        lines="mount --bind $SKEWED_PROLOG $PROLOG",
        job=Found(check="clock", state="WARN", node=PAIR, word="h800-02 +120 s"),
        local="one host has one clock",
    ),
    "absent node": Case(
        # The kernel does not answer: the node's processes run, and nothing ever comes from them.
        lines="mount --bind $FIFO $NODE/root/sys/class/infiniband/mlx5_0/fw_ver",
        options=("preflight.timeout_s=10",),
        job=Found(check="reported", word="no facts"),
    ),
}
