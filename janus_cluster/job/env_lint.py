"""What is doubtful about the exported variables. Warnings only: the user's own values are never changed.

Four kinds: names that nothing reads, values out of range, settings that hide a fault, names that torch has renamed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence

from janus_cluster.job.nearest import did_you_mean
from janus_cluster.job.resolved import EnvVar
from janus_cluster.job.templates import load_nccl_variable_names
from janus_cluster.job.torch_names import CUDA_NAMES, KNOWN, OMP_NAMES, RENAMED

PREFIXES = ("NCCL_", "TORCH_", "PYTORCH_", "GLOO_", "OMP_", "CUDA_")

_NTHREADS = ("64", "128", "256", "512")
_RETRIES = 7  # NCCL_IB_RETRY_CNT's default and maximum
_LONGEST_IB_TIMEOUT = 23  # 4.096 µs · 2^23 · 7 = 4 min; each step more doubles it
_GDR_LEVELS = ("LOC", "PIX", "PXB", "PHB", "SYS")
_TORCHRUN = "MASTER_ADDR MASTER_PORT RANK LOCAL_RANK GROUP_RANK WORLD_SIZE LOCAL_WORLD_SIZE NODE_RANK NNODES"
_OWNED_BY_TORCHRUN = frozenset(_TORCHRUN.split())

Version = tuple[int, ...]


def lint_env(
    env: Sequence[EnvVar], *, known_nccl: Collection[str] | None = None, torch_version: Version | None = None
) -> list[str]:
    """One line per doubtful variable: name, value, who set it, what is wrong with it and what to do.

    `known_nccl` are the names that NCCL reads (default: the shipped list). `torch_version` is the one installed where
    the variables will be read; None: unknown, then only names that every supported torch has dropped are listed.
    """
    known_nccl = load_nccl_variable_names() if known_nccl is None else known_nccl
    values = {var.name: var.value for var in env}
    warnings = []
    for var in env:
        problem = (
            _judge_rename(var.name, values, torch_version)
            or _judge_value(var.name, var.value)
            or _judge_name(var.name, known_nccl)
        )
        if problem:
            warnings.append(f"{var.name}={var.value} ({var.origin}): {problem}")
    return warnings + _judge_combinations(values)


def select_linted(environ: Mapping[str, str], *, origin: str) -> list[EnvVar]:
    """The variables of a shell that the lint has rules for."""
    return [
        EnvVar(name=name, value=value, reason="", origin=origin)
        for name, value in sorted(environ.items())
        if name.startswith(PREFIXES) or name in _OWNED_BY_TORCHRUN
    ]


def _judge_rename(name: str, values: Mapping[str, str], torch: Version | None) -> str | None:
    """The name against the installed torch, in both directions."""
    if name in RENAMED:
        new, since = RENAMED[name]
        is_old = torch >= since if torch is not None else since < (2, 9)
        if is_old and (new not in values or not name.startswith("PYTORCH_")):
            return f"retired name; torch now reads {new}"
    if torch is None:
        return None
    for old, (new, since) in RENAMED.items():
        if name == new and torch < since and old not in values and not old.startswith("PYTORCH_HIP"):
            return f"torch {'.'.join(map(str, torch))} does not know this name yet; it reads {old}"
    return None


def _judge_value(name: str, value: str) -> str | None:
    if name in _OWNED_BY_TORCHRUN:
        return "set by torchrun for every rank; this value has no effect"
    rule = _RULES.get(name)
    return rule(value) if rule is not None else None


def _judge_name(name: str, known_nccl: Collection[str]) -> str | None:
    if name in _RULES or name in RENAMED:
        return None
    for prefix, known, reader in (
        ("NCCL_", known_nccl, "NCCL"),
        ("TORCH_NCCL_", KNOWN, "torch"),
        ("TORCH_FR_", KNOWN, "torch"),
        ("CUDA_", CUDA_NAMES, "CUDA"),
        ("OMP_", OMP_NAMES, "OpenMP"),
    ):
        if name.startswith(prefix) and name not in known:
            guess = did_you_mean(name, known, cutoff=0.8)
            # Sites name their own CUDA_ variables; only a near miss is a likely mistake.
            if guess or prefix != "CUDA_":
                return f"{reader} knows no variable of this name and ignores it{guess}"
    return None


def _judge_combinations(values: Mapping[str, str]) -> list[str]:
    warnings = []
    net, ib_off = values.get("NCCL_NET", "").upper(), values.get("NCCL_IB_DISABLE") == "1"
    if net == "IB" and ib_off:
        warnings.append("NCCL_NET=IB with NCCL_IB_DISABLE=1: NCCL has no network left; remove one of the two")
    elif ib_off and net != "SOCKET":
        warnings.append(
            "NCCL_IB_DISABLE=1: InfiniBand is off and a broken one stays hidden; unset it, or set NCCL_NET=Socket"
        )
    threads, sockets = values.get("NCCL_SOCKET_NTHREADS", ""), values.get("NCCL_NSOCKS_PERTHREAD", "")
    if threads.isdigit() and sockets.isdigit() and int(threads) * int(sockets) > 64:
        warnings.append(
            f"NCCL_SOCKET_NTHREADS={threads} × NCCL_NSOCKS_PERTHREAD={sockets}: NCCL refuses more than 64 sockets"
        )
    return warnings


def _whole(least: int, most: int, instead: str) -> Callable[[str], str | None]:
    """A rule: a whole number from `least` to `most`."""

    def judge(value: str) -> str | None:
        if value.isascii() and value.isdigit() and least <= int(value) <= most:
            return None
        return f"not a whole number from {least} to {most}. {instead}"

    return judge


def _not(bad: str, why: str) -> Callable[[str], str | None]:
    """A rule: any value but `bad`."""
    return lambda value: why if value.upper() == bad else None


def _one_of(allowed: Sequence[str], instead: str) -> Callable[[str], str | None]:
    return lambda value: None if value.upper() in allowed else f"not one of {', '.join(allowed)}. {instead}"


def _judge_nthreads(value: str) -> str | None:
    if value in _NTHREADS:
        return None
    return f"NCCL allows {', '.join(_NTHREADS)} and changes other values in silence (more becomes 512). Leave it unset"


def _judge_ib_hca(value: str) -> str | None:
    if value.lstrip("^").startswith("=") or not value:
        return None
    return "a prefix: it also takes RoCE, bond and storage ports that begin so. Write =mlx5_0:1,… for an exact list"


def _judge_socket_ifname(value: str) -> str | None:
    if value.startswith(("=", "^")) or not value:
        return None
    return f"a prefix: it also takes every interface that begins so. Write ={value}"


def _judge_gloo_ifname(value: str) -> str | None:
    return f"gloo takes the bare name. Write {value.lstrip('=')}" if value.startswith("=") else None


def _judge_ib_timeout(value: str) -> str | None:
    if not value.isdigit() or int(value) > 31:
        return "not a whole number from 0 to 31; NCCL ignores it. 22 is about 2 min with 7 retries"
    seconds = 4.096e-6 * 2 ** int(value) * _RETRIES
    if int(value) > _LONGEST_IB_TIMEOUT:
        return f"a dead link is noticed only after about {seconds / 60:.0f} min. 22 is about 2 min"
    if int(value) < 18:
        return f"a send is given up after about {seconds:.1f} s, which a switch reroute exceeds. 22 is about 2 min"
    return None


def _judge_p2p_level(value: str) -> str | None:
    if value.upper() in ("SYS", "5"):
        return "a broken NVLink stays hidden behind PCIe peer-to-peer through the CPU. Leave it unset"
    return None


def _judge_gdr_level(value: str) -> str | None:
    if value.isdigit():
        return "a number is the legacy spelling (5 is SYS: through the CPU). Write PXB, or leave it unset"
    return (
        None if value.upper() in _GDR_LEVELS else f"not one of {', '.join(_GDR_LEVELS)}. Write PXB, or leave it unset"
    )


def _judge_gid_index(value: str) -> str | None:
    if value == "0":
        return "the RoCE v1 address, which is not routed; on InfiniBand it is ignored. Leave it unset"
    return None if value.lstrip("-").isdigit() else "not a whole number. Leave it unset"


def _judge_debug_subsys(value: str) -> str | None:
    if "ALL" in value.upper().split(","):
        return (
            "logs every NCCL call of every rank, gigabytes in a day. INIT,NET,GRAPH,ENV shows how ranks are connected"
        )
    return None


def _judge_distributed_debug(value: str) -> str | None:
    if value.upper() == "DETAIL":
        return "checks every collective on all ranks and slows each step. Use OFF"
    return None if value.upper() in ("OFF", "INFO") else "not one of OFF, INFO, DETAIL: torch refuses to start. Use OFF"


def _judge_omp_threads(value: str) -> str | None:
    if re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", value, re.ASCII):
        return None
    return "not a whole number above 0; OpenMP then takes every core for each rank. 8 is what the profiles set"


_RULES: dict[str, Callable[[str], str | None]] = {
    "NCCL_NTHREADS": _judge_nthreads,
    "NCCL_IB_HCA": _judge_ib_hca,
    "NCCL_SOCKET_IFNAME": _judge_socket_ifname,
    "GLOO_SOCKET_IFNAME": _judge_gloo_ifname,
    "NCCL_IB_TIMEOUT": _judge_ib_timeout,
    "NCCL_IB_RETRY_CNT": _whole(0, 7, "7 is the default and the maximum. Leave it unset"),
    "NCCL_IB_GID_INDEX": _judge_gid_index,
    "NCCL_IB_SL": _whole(0, 15, "Leave it unset"),
    "NCCL_IB_TC": _whole(0, 255, "Leave it unset"),
    "NCCL_IB_QPS_PER_CONNECTION": _whole(1, 128, "1 is the default"),
    "NCCL_CROSS_NIC": _whole(0, 2, "2 is the default; 0 for rail-optimised fabrics"),
    "NCCL_NET_GDR_LEVEL": _judge_gdr_level,
    "NCCL_P2P_LEVEL": _judge_p2p_level,
    "NCCL_P2P_DISABLE": _not("1", "NVLink is switched off, and a broken one stays hidden. Unset it"),
    "NCCL_SHM_DISABLE": _not("1", "a small or full /dev/shm stays hidden behind the slower network. Unset it"),
    "NCCL_IGNORE_DISABLED_P2P": _not("1", "a broken NVLink or peer-to-peer is no longer reported. Unset it"),
    "NCCL_SOCKET_NTHREADS": _whole(1, 16, "4 is what h800-ethernet sets"),
    "NCCL_NSOCKS_PERTHREAD": _whole(1, 16, "4 is what h800-ethernet sets"),
    "NCCL_BUFFSIZE": _whole(4096, 2**30, "Bytes; 4194304 is the default"),
    "NCCL_MIN_NCHANNELS": _whole(1, 64, "Leave it unset"),
    "NCCL_MAX_NCHANNELS": _whole(1, 64, "Leave it unset"),
    "NCCL_DEBUG": _one_of(("VERSION", "WARN", "INFO", "TRACE", "ABORT"), "WARN for training, INFO to look closer"),
    "NCCL_DEBUG_SUBSYS": _judge_debug_subsys,
    "TORCH_DISTRIBUTED_DEBUG": _judge_distributed_debug,
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": _not(
        "0", "a dead peer is never noticed and the job hangs. Unset it (default 3)"
    ),
    "TORCH_NCCL_ENABLE_MONITORING": _not("0", "a stuck watchdog is never ended and the job hangs. Unset it"),
    "TORCH_NCCL_BLOCKING_WAIT": _not("1", "every collective blocks the CPU, and errors are raised late. Unset it"),
    "CUDA_LAUNCH_BLOCKING": _not("1", "every kernel is waited for: training is several times slower. Unset it"),
    "CUDA_DEVICE_MAX_CONNECTIONS": _whole(1, 32, "Leave it unset"),
    "OMP_NUM_THREADS": _judge_omp_threads,
}
