"""A pretend H800 node: its programs, sysfs and procfs trees, installed packages. Own values, true shapes.

Nothing that the gate judges of such a node depends on the machine or the environment of the tests, but for what a
process cannot pretend: its Python, its limits of locked memory and open files, the size of the disk behind /dev/shm.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from janus_cluster import __version__
from janus_cluster.job.load import load_job
from janus_cluster.job.resolve import resolve_job
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.job.resources import jobs_dir
from janus_cluster.preflight.facts import read_facts
from janus_cluster.preflight.static import judge_static
from janus_cluster.run.files import write_text_atomically
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.verdict import CheckResult

NUM = 8
# Checks of the process that runs the tests, its shell and its disk.
OF_THIS_MACHINE = (
    "limits.memlock", "limits.nofile", "limits.cpus", "limits.shm", "limits.shm_free", "limits.tmp", "environment",
)  # fmt: skip
DRIVER = "570.158.01"
# Of Linux 5.15, so that DMA-BUF would be there if the driver were the open one.
PROC = {
    "meminfo": "MemTotal:       2113407800 kB\nMemAvailable:   2000000000 kB\n",
    "sys/kernel/osrelease": "5.15.0-105-generic\n",
    "net/route": "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
    "bond0\t00000000\t0100000A\t0003\t0\t0\t100\t00000000\t0\t0\t0\n",
}


def sound_packages() -> dict[str, str]:
    """Versions that the profiles' ranges take, with a torch whose CUDA 12.8 the driver serves."""
    return {
        "janus-cluster": __version__,
        "torch": "2.9.1+cu128",
        "transformers": "5.23.0",
        "deepspeed": "0.19.8",
        "pydantic": "2.12.4",
        "nvidia-nccl-cu12": "2.27.5",
    }


def write_packages(folder: Path, versions: dict[str, str], *, cuda: str | None) -> None:
    """What pip leaves of packages, without their code; torch's version.py names the CUDA that it was built for."""
    for name, version in versions.items():
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if "torch" in versions:
        (folder / "torch").mkdir()
        lines = [f"__version__ = '{versions['torch']}'", "debug = False", f"cuda: Optional[str] = {cuda!r}"]
        (folder / "torch" / "version.py").write_text("\n".join(["from typing import Optional", "", *lines, ""]))


def uuid(i: int) -> str:
    return f"GPU-{i:08x}-aaaa-bbbb-cccc-{i:012x}"


def gpu_rows(num: int = NUM, *, name: str = "NVIDIA H800", memory: str = "81559") -> list[str]:
    return [f"{i}, {uuid(i)}, {name}, {memory}, {DRIVER}, 00000000:{0x1B + i:02X}:00.0" for i in range(num)]


def smi_texts() -> dict[str, str]:
    """What a sound node's nvidia-smi prints, family by family, header first."""
    each = range(NUM)
    return {
        "identity": "index, uuid, name, memory.total [MiB], driver_version, pci.bus_id\n"
        + "\n".join(gpu_rows())
        + "\n",
        "ecc": "index, ecc.errors.uncorrected.volatile.total, ecc.errors.uncorrected.aggregate.total, "
        "ecc.errors.uncorrected.aggregate.sram.thresholdExceeded\n" + "".join(f"{i}, 0, 0, No\n" for i in each),
        "throttle": "index, clocks_event_reasons.active\n" + "".join(f"{i}, 0x0000000000000001\n" for i in each),
        "pcie": "index, pcie.link.width.current, pcie.link.gen.max, pcie.link.gen.gpumax\n"
        + "".join(f"{i}, 16, 5, 5\n" for i in each),
        "load": "index, pstate, pcie.link.gen.current, pcie.link.gen.max, pcie.link.width.current, "
        "clocks.current.sm [MHz], clocks.max.sm [MHz], clocks_event_reasons.active, pcie.link.gen.gpumax\n"
        + "".join(f"{i}, P0, 5, 5, 16, 1755, 1980, 0x0000000000000004, 5\n" for i in each),
        "health": "index, clocks.current.sm [MHz], clocks.max.sm [MHz], power.draw [W], temperature.gpu, "
        "memory.used [MiB], clocks_event_reasons.active\n"
        + "".join(f"{i}, 1400, 1980, 690.12, 61, 70112, 0x0000000000000004\n" for i in each),
        "persistence": "index, persistence_mode\n" + "".join(f"{i}, Enabled\n" for i in each),
        "fabric": "index, fabric.state, fabric.status\n" + "".join(f"{i}, Completed, Success\n" for i in each),
        "mig": "index, mig.mode.current, mig.mode.pending\n" + "".join(f"{i}, Disabled, Disabled\n" for i in each),
        "recovery": "index, gpu_recovery_action\n" + "".join(f"{i}, None\n" for i in each),
        "power": "index, power.limit [W], power.default_limit [W]\n" + "".join(f"{i}, 700.00, 700.00\n" for i in each),
        "processes": "gpu_uuid, pid, process_name, used_gpu_memory [MiB]\n",
        "remapped": "gpu_uuid, remapped_rows.correctable, remapped_rows.uncorrectable, remapped_rows.pending, "
        "remapped_rows.failure\n" + "".join(f"{uuid(i)}, 0, 0, 0, 0\n" for i in each),
        "nvlink": "".join(
            f"GPU {i}: NVIDIA H800 (UUID: {uuid(i)})\n" + "".join(f"\t Link {k}: 26.562 GB/s\n" for k in range(8))
            for i in each
        ),
    }


KERNEL_STATES = {"Active": "4: ACTIVE", "Down": "1: DOWN", "Initializing": "2: INIT"}


KERNEL_PHYS = {"LinkUp": "5: LinkUp", "Polling": "2: Polling", "Disabled": "3: Disabled"}


SPEEDS = {400: "4X NDR", 200: "4X HDR", 100: "4X EDR", 56: "4X FDR", 40: "4X QDR", 10: "4X SDR"}


@dataclass
class FakePort:
    """One port, as both sysfs and ibstat will show it."""

    device: str
    state: str = "Active"
    phys: str = "LinkUp"
    rate: int = 400
    layer: str = "InfiniBand"
    ca_type: str = "MT4129"
    width: str | None = "16"
    speed: str | None = "32.0 GT/s PCIe"
    speed_max: str | None = "32.0 GT/s PCIe"
    is_virtual: bool = False

    def write(self, infiniband: Path) -> None:
        port = infiniband / self.device / "ports" / "1"
        (port / "counters").mkdir(parents=True)
        for name, value in (
            ("state", KERNEL_STATES[self.state]),
            ("phys_state", KERNEL_PHYS[self.phys]),
            ("rate", f"{self.rate} Gb/sec ({SPEEDS[self.rate]})"),
            ("link_layer", self.layer),
            ("counters/symbol_error", "0"),
        ):
            (port / name).write_text(value + "\n")
        (infiniband / self.device / "fw_ver").write_text("28.41.1000\n")
        (infiniband / self.device / "hca_type").write_text(self.ca_type + "\n")
        device = infiniband / self.device / "device"
        device.mkdir()
        for name, value in (
            ("current_link_width", self.width),
            ("current_link_speed", self.speed),
            ("max_link_speed", self.speed_max),
        ):
            if value is not None:
                (device / name).write_text(value + "\n")
        if self.is_virtual:
            (device / "physfn").mkdir()

    def ibstat(self) -> str:
        lines = [
            f"CA '{self.device}'",
            f"\tCA type: {self.ca_type}",
            "\tNumber of ports: 1",
            "\tFirmware version: 28.41.1000",
            "\tHardware version: 0",
            "\tNode GUID: 0x0000000000000001",
            "\tSystem image GUID: 0x0000000000000001",
            "\tPort 1:",
            f"\t\tState: {self.state}",
            f"\t\tPhysical state: {self.phys}",
            f"\t\tRate: {self.rate}",
            "\t\tBase lid: 7",
            "\t\tLMC: 0",
            "\t\tSM lid: 1",
            "\t\tCapability mask: 0xa751e848",
            "\t\tPort GUID: 0x0000000000000001",
            f"\t\tLink layer: {self.layer}",
        ]
        return "\n".join(lines) + "\n"


def sound_ports() -> list[FakePort]:
    """Eight rails, a bonded Ethernet port and an Ethernet port that is down, as on a healthy node."""
    return [
        *(FakePort(f"mlx5_{i}") for i in range(NUM)),
        FakePort("mlx5_8", state="Down", phys="Disabled", rate=40, layer="Ethernet", ca_type="MT4127"),
        FakePort("mlx5_bond_0", rate=200, layer="Ethernet", ca_type="MT41692"),
    ]


def verbs_text(devices: list[str]) -> str:
    head = "    device          \t   node GUID\n    ------          \t----------------\n"
    return head + "".join(f"    {name:<16}\t{i + 1:016x}\n" for i, name in enumerate(devices))


_SMI = """#!/bin/sh
here=$(dirname "$0")/smi
case "$1" in
    --query-gpu=index,uuid*) f=identity ;;
    --query-gpu=index,ecc*) f=ecc ;;
    --query-gpu=index,clocks_event*) f=throttle ;;
    --query-gpu=index,pcie*) f=pcie ;;
    --query-gpu=index,pstate*) f=load ;;
    --query-gpu=index,clocks.current*) f=health ;;
    --query-gpu=index,persistence*) f=persistence ;;
    --query-gpu=index,fabric*) f=fabric ;;
    --query-gpu=index,mig*) f=mig ;;
    --query-gpu=index,gpu_recovery*) f=recovery ;;
    --query-gpu=index,power*) f=power ;;
    --query-compute-apps=*) f=processes ;;
    --query-remapped-rows=*) f=remapped ;;
    nvlink) f=nvlink ;;
    *) echo "Invalid combination of input arguments."; exit 6 ;;
esac
if [ ! -e "$here/$f" ]; then
    echo "Field \"${1##*,}\" is not a valid field to query."
    exit 2
fi
cat "$here/$f"
exit "$(cat "$here/rc")"
"""


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@dataclass
class FakeNode:
    """Build with `write`; change `smi`, `ports`, `packages`, … before. `cuda` is what its torch was built for."""

    folder: Path
    name: str = "h800-01"
    sets: tuple[str, ...] = ()
    job: str = "preflight"
    smi: dict[str, str] = field(default_factory=smi_texts)
    smi_rc: int = 0
    ports: list[FakePort] = field(default_factory=sound_ports)
    ibstat_tail: str = ""
    ibstat_rc: int = 0
    peermem: bool = True
    packages: dict[str, str] = field(default_factory=sound_packages)
    cuda: str | None = "12.8"
    programs: dict[str, str] = field(default_factory=dict)

    @property
    def bin(self) -> Path:
        return self.folder / "bin"

    @property
    def root(self) -> Path:
        return self.folder / "root"

    def write(self) -> FakeNode:
        (self.bin / "smi").mkdir(parents=True)
        for family, text in self.smi.items():
            (self.bin / "smi" / family).write_text(text)
        (self.bin / "smi" / "rc").write_text(f"{self.smi_rc}\n")
        infiniband = self.root / "sys" / "class" / "infiniband"
        infiniband.mkdir(parents=True)
        for port in self.ports:
            port.write(infiniband)
        if self.peermem:
            (self.root / "sys" / "module" / "nvidia_peermem").mkdir(parents=True)
            (self.root / "sys" / "module" / "nvidia_peermem" / "version").write_text(f"{DRIVER}\n")
        for name, text in PROC.items():
            path = self.root / "proc" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        write_packages(self.root / "site-packages", self.packages, cuda=self.cuda)
        (self.bin / "ibstat.txt").write_text("".join(p.ibstat() for p in self.ports))
        (self.bin / "ibv.txt").write_text(verbs_text([p.device for p in self.ports]))
        here = 'here=$(dirname "$0")\n'
        programs = {
            "nvidia-smi": _SMI,
            "ibstat": f'#!/bin/sh\n{here}cat "$here/ibstat.txt"\n{self.ibstat_tail}\nexit {self.ibstat_rc}\n',
            "ibv_devices": f'#!/bin/sh\n{here}cat "$here/ibv.txt"\n',
            "ibv_devinfo": f'#!/bin/sh\n{here}sed -n "s/^ *\\(mlx[^ ]*\\).*/hca_id:\\t\\1/p" "$here/ibv.txt"\n',
            "lspci": "#!/bin/sh\necho '15:01.0 PCI bridge: X'\necho '\tACSCtl: SrcValid- ReqRedir- CmpltRedir-'\n",
            "dmesg": "#!/bin/sh\necho '[    1.0] nothing to see'\n",
        } | self.programs
        for name, text in programs.items():
            write_program(self.bin / name, text)
        return self

    def resolve(self) -> ResolvedJob:
        run_dir = self.folder / "run"
        run_dir.mkdir(exist_ok=True)
        sets = ["nodes=1", *self.sets]
        loaded = load_job(jobs_dir() / f"{self.job}.yaml", sets=sets, environ={})
        return resolve_job(loaded, run_dir=run_dir, cluster="local", environ={}, cwd=self.folder, python=sys.executable)

    def environ(self) -> dict[str, str]:
        return os.environ | {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}"}

    def facts(self, resolved: ResolvedJob) -> dict[str, Any]:
        """This node's facts with its programs first on PATH."""
        before = os.environ["PATH"]
        os.environ["PATH"] = self.environ()["PATH"]
        try:
            return read_facts(resolved, node=self.name)
        finally:
            os.environ["PATH"] = before

    def facts_of_process(self, resolved: ResolvedJob) -> dict[str, Any]:
        """What `node.task --phase facts` wrote for this node."""
        run = RunDir(Path(resolved.run_dir))
        run.bundle(1).path.mkdir(parents=True, exist_ok=True)
        write_text_atomically(run.bundle(1).resolved_json, resolved.model_dump_json())
        run.preflight(1).mkdir(parents=True, exist_ok=True)
        argv = [sys.executable, "-m", "janus_cluster.node.task", str(run.path), "--bundle", "1"]
        argv += ["--attempt", "1", "--phase", "facts"]
        identity = {"JANUS_NODE": self.name, "JANUS_NODE_RANK": "0", "JANUS_NUM_NODES": "1"}
        subprocess.run(argv, env=self.environ() | identity, check=True, timeout=600, capture_output=True)
        value: dict[str, Any] = json.loads(run.facts_json(1, self.name).read_text())
        return value

    def judge(self) -> dict[str, CheckResult]:
        """Check id → result, after the real facts phase."""
        resolved = self.resolve()
        results = judge_static({self.name: self.facts(resolved)}, resolved)
        return {r.id: r for r in results}


def h800_node(folder: Path, **changes: Any) -> FakeNode:
    """A node whose job is judged as h800-ib, with its sysfs under preflight.sysfs_root."""
    sets = (*changes.pop("sets", ()), f"preflight.sysfs_root={folder / 'root'}")
    return FakeNode(folder, sets=sets, **changes)
