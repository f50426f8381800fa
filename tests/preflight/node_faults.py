"""Faults of one node's GPUs and rails: what is put there, which check finds it, its state, a word that names it."""

from __future__ import annotations

from typing import Any

from node_fixtures import NUM, FakePort, gpu_rows, smi_texts, sound_packages, sound_ports, uuid, verbs_text


def with_port(index: int, **changes: Any) -> list[FakePort]:
    ports = sound_ports()
    ports[index] = FakePort(f"mlx5_{index}", **changes)
    return ports


def smi(**changes: str) -> dict[str, str]:
    return smi_texts() | changes


def replaced(family: str, old: str, new: str) -> dict[str, str]:
    text = smi_texts()[family]
    assert old in text
    return smi(**{family: text.replace(old, new, 1)})


LOST = "Unable to determine the device handle for GPU0000:20:00.0: Unknown Error\n" + smi_texts()["identity"].replace(
    gpu_rows()[5], f"5, {uuid(5)}, [Unknown Error], [Unknown Error]"
)
IDENTITY_HEADER = smi_texts()["identity"].splitlines()[0]

FAULTS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "rail down": ({"ports": with_port(3, state="Down", phys="Polling", rate=10)}, "hca.rails", "FAIL", "mlx5_3:1"),
    "rail without a subnet manager": ({"ports": with_port(3, state="Initializing")}, "hca.rails", "FAIL", "2: INIT"),
    "rail at half rate": ({"ports": with_port(6, rate=200)}, "hca.rails", "FAIL", "mlx5_6:1 200 Gb/sec"),
    "rail on half the lanes": ({"ports": with_port(2, width="8")}, "hca.pcie_width", "FAIL", "mlx5_2:1 x8"),
    "one rail missing": ({"ports": sound_ports()[1:]}, "hca.rails", "FAIL", "7 of 8"),
    "RoCE instead of InfiniBand": (
        {"ports": [FakePort(f"mlx5_{i}", layer="Ethernet") for i in range(NUM)]},
        "site.kind",
        "FAIL",
        "RoCE",
    ),
    "no adapter at all": ({"ports": []}, "site.kind", "FAIL", "no RDMA"),
    "ibpanic after valid blocks": (
        {
            "ibstat_tail": "echo \"ibpanic: [9] main: stat of IB device 'mlx5_8' failed\" >&2",
            "ibstat_rc": 255,
        },
        "hca.ibstat",
        "WARN",
        "ibpanic",
    ),
    "ibstat prints nothing and ends with 0": (
        {"programs": {"ibstat": "#!/bin/sh\nexit 0\n"}},
        "hca.ibstat",
        "WARN",
        "no adapter",
    ),
    "ibstat sees another state than the kernel": (
        {"programs": {"ibstat": '#!/bin/sh\nsed \'s/Rate: 400/Rate: 100/\' "$(dirname "$0")/ibstat.txt"\n'}},
        "hca.agree",
        "FAIL",
        "mlx5_0:1: rate",
    ),
    "ibv_devices with its header only": (
        {"programs": {"ibv_devices": f"#!/bin/sh\ncat <<'X'\n{verbs_text([])}X\n"}},
        "hca.verbs",
        "FAIL",
        "0 devices",
    ),
    "no peermem": ({"peermem": False}, "hca.peermem", "FAIL", "not loaded"),
    "lost GPU": (
        {"smi": smi(identity=LOST), "smi_rc": 15},
        "gpu.count",
        "FAIL",
        "Unable to determine the device handle",
    ),
    "7 of 8 GPUs": (
        {"smi": smi(identity=IDENTITY_HEADER + "\n" + "\n".join(gpu_rows(7)) + "\n")},
        "gpu.count",
        "FAIL",
        "7 of 8",
    ),
    "wrong SKU": (
        {"smi": smi(identity="\n".join([IDENTITY_HEADER, *gpu_rows(name="NVIDIA H800 PCIe")]))},
        "gpu.model",
        "FAIL",
        "NVIDIA H800 PCIe",
    ),
    "MIG or a smaller part": (
        {"smi": replaced("identity", "81559", "40000")},
        "gpu.memory",
        "FAIL",
        "GPU 0: 40000",
    ),
    "ECC": ({"smi": replaced("ecc", "4, 0, 0", "4, 2, 2")}, "gpu.ecc", "FAIL", "GPU 4: 2 uncorrected"),
    "ECC, long ago": (
        {"smi": replaced("ecc", "4, 0, 0", "4, 0, 2")},
        "gpu.ecc",
        "WARN",
        "GPU 4: 2 uncorrected (aggregate)",
    ),
    "ECC not reported": ({"smi": replaced("ecc", "4, 0, 0", "4, [N/A], [N/A]")}, "gpu.ecc", "ERROR", "GPU 4"),
    "remap failed": (
        {"smi": replaced("remapped", ", 0, 0, 0, 0", ", 0, 1, 0, 1")},
        "gpu.remapped_rows",
        "FAIL",
        "failure 1",
    ),
    "remap pending": (
        {"smi": replaced("remapped", ", 0, 0, 0, 0", ", 0, 0, Yes, No")},
        "gpu.remapped_rows",
        "FAIL",
        "pending Yes",
    ),
    "thermal throttle": (
        {"smi": replaced("throttle", "0x0000000000000001", "0x0000000000000060")},
        "gpu.throttle",
        "FAIL",
        "thermal",
    ),
    "GPU on half the lanes": (
        {"smi": replaced("pcie", "0, 16, 5", "0, 8, 5")},
        "gpu.pcie_width",
        "FAIL",
        "GPU 0: x8",
    ),
    "no persistence": ({"smi": replaced("persistence", "Enabled", "Disabled")}, "gpu.persistence", "WARN", "Disabled"),
    "fabric manager stuck": (
        {"smi": replaced("fabric", "Completed, Success", "In Progress, N/A")},
        "gpu.fabric",
        "FAIL",
        "In Progress",
    ),
    "NVLink down": (
        {"smi": replaced("nvlink", "Link 3: 26.562 GB/s", "Link 3: <inactive>")},
        "gpu.nvlink",
        "FAIL",
        "down: 3",
    ),
    "XID 79": (
        {"programs": {"dmesg": "#!/bin/sh\necho '[9.1] NVRM: Xid (PCI:0000:5d:00): 79, pid=1, fallen off.'\n"}},
        "gpu.xid",
        "FAIL",
        "XID 79",
    ),
    "dmesg refused": (
        {"programs": {"dmesg": "#!/bin/sh\necho 'dmesg: read: Operation not permitted' >&2\nexit 1\n"}},
        "gpu.xid",
        "SKIP",
        "not permitted",
    ),
    "torch for a newer CUDA than the driver's": (
        {"packages": sound_packages() | {"torch": "2.13.0+cu130"}, "cuda": "13.0"},
        "versions.driver",
        "WARN",
        "driver 570.158.01, CUDA 13.0",
    ),
    "torch without CUDA": (
        {"packages": sound_packages() | {"torch": "2.13.0+cpu"}, "cuda": None},
        "versions.cuda",
        "WARN",
        "torch 2.13.0+cpu is a build without CUDA",
    ),
    "old torch": (
        {"packages": sound_packages() | {"torch": "2.5.1+cu124"}, "cuda": "12.4"},
        "versions",
        "FAIL",
        "torch 2.5.1+cu124 < 2.8",
    ),
    "a package is missing": (
        {"packages": {name: v for name, v in sound_packages().items() if name != "deepspeed"}},
        "versions",
        "FAIL",
        "deepspeed not installed",
    ),
}


HANGS = {
    "sleeps": "#!/bin/sh\nexec sleep 600\n",
    "ignores SIGTERM": "#!/bin/sh\ntrap '' TERM INT HUP\nwhile :; do sleep 600; done\n",
    "leaves a child that holds the output": "#!/bin/sh\nsleep 600 &\nwait\n",
}
