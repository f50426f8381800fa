"""What is doubtful about the exported variables. Warnings only: the user's own values are never changed."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Sequence

from janus_cluster.config.schema import EnvVar
from janus_cluster.render.load import load_nccl_variable_names

_NTHREADS = ("64", "128", "256", "512")
_RETRIES = 7  # NCCL_IB_RETRY_CNT's default and maximum
_LONGEST_IB_TIMEOUT = 23  # 4.096 µs · 2^23 · 7 = 4 min; each step more doubles it

_RETIRED = {
    "NCCL_ASYNC_ERROR_HANDLING": "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "NCCL_BLOCKING_WAIT": "TORCH_NCCL_BLOCKING_WAIT",
    "NCCL_DESYNC_DEBUG": "TORCH_NCCL_DESYNC_DEBUG",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "TORCH_FR_BUFFER_SIZE",
}
_OWNED_BY_TORCHRUN = frozenset(
    [
        "MASTER_ADDR",
        "MASTER_PORT",
        "RANK",
        "LOCAL_RANK",
        "GROUP_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "NODE_RANK",
        "NNODES",
    ]
)


def lint_env(env: Sequence[EnvVar], *, known_nccl: Collection[str] | None = None) -> list[str]:
    """One line per doubtful variable: name, value, who set it, what is wrong with it and what to do.

    `known_nccl` are the names that NCCL reads (default: the shipped list).
    """
    known_nccl = load_nccl_variable_names() if known_nccl is None else known_nccl
    values = {var.name: var.value for var in env}
    warnings = []
    for var in env:
        problem = _judge_variable(var.name, var.value, known_nccl)
        if problem:
            warnings.append(f"{var.name}={var.value} ({var.origin}): {problem}")
    if values.get("NCCL_NET", "").upper() == "IB" and values.get("NCCL_IB_DISABLE") == "1":
        warnings.append("NCCL_NET=IB with NCCL_IB_DISABLE=1: NCCL has no network left; remove one of the two")
    return warnings


def _judge_variable(name: str, value: str, known_nccl: Collection[str]) -> str | None:
    if name in _RETIRED:
        return f"retired name; torch now reads {_RETIRED[name]}"
    if name in _OWNED_BY_TORCHRUN:
        return "set by torchrun for every rank; this value has no effect"
    rule = _RULES.get(name)
    if rule is not None:
        return rule(value)
    if name.startswith("NCCL_") and name not in known_nccl:
        near = difflib.get_close_matches(name, sorted(known_nccl), n=1, cutoff=0.8)
        guess = f"; did you mean {near[0]}?" if near else ""
        return f"NCCL knows no variable of this name and ignores it{guess}"
    return None


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


def _judge_debug_subsys(value: str) -> str | None:
    if "ALL" in value.upper().split(","):
        return (
            "logs every NCCL call of every rank, gigabytes in a day. INIT,NET,GRAPH,ENV shows how ranks are connected"
        )
    return None


def _judge_distributed_debug(value: str) -> str | None:
    return "checks every collective on all ranks and slows each step. Use OFF" if value.upper() == "DETAIL" else None


_RULES: dict[str, Callable[[str], str | None]] = {
    "NCCL_NTHREADS": _judge_nthreads,
    "NCCL_IB_HCA": _judge_ib_hca,
    "NCCL_SOCKET_IFNAME": _judge_socket_ifname,
    "GLOO_SOCKET_IFNAME": _judge_gloo_ifname,
    "NCCL_IB_TIMEOUT": _judge_ib_timeout,
    "NCCL_P2P_LEVEL": _judge_p2p_level,
    "NCCL_DEBUG_SUBSYS": _judge_debug_subsys,
    "TORCH_DISTRIBUTED_DEBUG": _judge_distributed_debug,
}
