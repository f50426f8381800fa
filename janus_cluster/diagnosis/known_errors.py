"""Messages of NCCL, libibverbs and CUDA whose cause is known: their class, and what to type on the node."""

from __future__ import annotations

import re
from dataclasses import dataclass

from janus_cluster.errors import FailureKind


@dataclass(frozen=True, kw_only=True)
class KnownError:
    """`advice`: a command for the node, and after # why. `of_pair`: a lost peer is reported the same way."""

    pattern: re.Pattern[str]
    kind: FailureKind
    advice: str
    of_pair: bool = False


# The status of a work completion, as number and since NCCL 2.28 also by name. Source: libibverbs, enum ibv_wc_status.
def _completion(numbers: str, names: str) -> re.Pattern[str]:
    status = rf"(?:error |status=)(?:IBV_WC_(?:{names})_ERR\()?(?:{numbers})\b"
    return re.compile(rf"Got completion from peer \S+ with {status}|IBV_WC_(?:{names})_ERR")


KNOWN: tuple[KnownError, ...] = (
    KnownError(
        pattern=re.compile(r"ibv_(?:reg_\w+|create_\w+|alloc_\w+).{0,80}?(?:Cannot allocate memory|error 12\b)"),
        kind="network",
        advice="ulimit -l   # too little locked memory for RDMA: unlimited in limits.conf, and in slurm.conf "
        "PropagateResourceLimitsExcept=MEMLOCK",
    ),
    KnownError(
        pattern=_completion("12|13", "RETRY_EXC|RNR_RETRY_EXC"),
        kind="network",
        advice="ibstat   # a send was never acknowledged: cable, switch port or the peer's HCA; "
        "`janus-cluster preflight` tests each rail",
        of_pair=True,
    ),
    KnownError(
        pattern=_completion("4|10|11", "LOC_PROT|REM_ACCESS|REM_OP"),
        kind="network",
        advice="lsmod | grep peermem   # an HCA could not read or write the memory: nvidia_peermem, IOMMU and ACS, "
        "NCCL_NET_GDR_LEVEL",
        of_pair=True,
    ),
    KnownError(
        pattern=_completion(r"\d+", r"\w+"),
        kind="network",
        advice="ibstat   # an RDMA transfer failed: link, switch or HCA; `janus-cluster preflight` tests each rail",
        of_pair=True,
    ),
    KnownError(
        pattern=re.compile(r"network \S+ not found|Failed to initialize any NET plugin|NET/IB ?: No device found"),
        kind="network",
        advice="ibv_devinfo   # NCCL_NET=IB finds no device that it can open: HCAs, /dev/infiniband in the container, "
        "NCCL_IB_HCA; without RDMA --set environment.profile=h800-ethernet",
    ),
    KnownError(
        pattern=re.compile(r"no socket interface found", re.IGNORECASE),
        kind="network",
        advice="ip -br link   # NCCL_SOCKET_IFNAME names no interface of this node; unset, the route's is taken",
    ),
    KnownError(
        pattern=re.compile(r"Error 802\b|system not yet initialized"),
        kind="environment",
        advice="systemctl status nvidia-fabricmanager   # CUDA waits for it on nodes with NVSwitch; its version "
        "must be the driver's",
    ),
    KnownError(
        pattern=re.compile(r"CUDA-capable device\(s\) is/are busy or unavailable"),
        kind="xid",
        advice="nvidia-smi --query-gpu=index,gpu_recovery_action,compute_mode --format=csv   # a GPU needs a reset, or "
        "another process holds it",
    ),
)


def find_known(message: str) -> KnownError | None:
    """The first known error that the message shows."""
    return next((known for known in KNOWN if known.pattern.search(message)), None)


def advice_for(message: str, node: str | None) -> str | None:
    """What to type, with the node; None for a message whose cause is not known."""
    known = find_known(message)
    if known is None:
        return None
    return known.advice.replace("   # ", f"   # on {node}: ", 1) if node else known.advice
