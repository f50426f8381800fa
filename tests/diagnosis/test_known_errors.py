"""Errors of NCCL, libibverbs and CUDA as torch raises them: their class, the node, and what to type there."""

from __future__ import annotations

from pathlib import Path

import pytest

from janus_cluster.diagnosis.card import next_steps
from janus_cluster.diagnosis.evidence import Evidence, RankError, RankExit
from janus_cluster.diagnosis.failure import classify
from janus_cluster.diagnosis.known_errors import KNOWN
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.bundle import ResolvedRecord
from janus_cluster.run.records.failure import FailureRecord

BACKEND = (
    "DistBackendError: NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.cpp:133, {}, NCCL version 2.21.5\n{}\n"
)
REMOTE = BACKEND.format(
    "remote process exited or there was a network error",
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
)
SYSTEM = BACKEND.format(
    "unhandled system error",
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. ",
)
USAGE = BACKEND.format("invalid usage", "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.")
INTERNAL = BACKEND.format("internal error - please report this issue", "ncclInternalError: Internal check failed.")
PEER = "Last error:\nNET/IB: Got completion from peer 198.18.0.2<38560> with "

CASES = {
    "status as a number": (f"{REMOTE}{PEER}error 12, opcode 0, len 0, vendor err 129", "network", "ibstat"),
    "status with the adapter": (
        f"{REMOTE}{PEER}status=12 opcode=1 len=0 vendor err 129 (Send) hca mlx5_3", "network", "ibstat"),
    "status by name": (
        f"{REMOTE}{PEER}status=IBV_WC_RETRY_EXC_ERR(12) opcode=IBV_WC_RDMA_WRITE(1) hca mlx5_3", "network", "ibstat"),
    "receiver not ready": (f"{REMOTE}{PEER}status=IBV_WC_RNR_RETRY_EXC_ERR(13) opcode=0", "network", "ibstat"),
    "protection error": (f"{REMOTE}{PEER}error 4, opcode 0, len 0, vendor err 81 (Send)", "network", "peermem"),
    "another status": (f"{REMOTE}{PEER}error 5, opcode 0, len 0, vendor err 249", "network", "ibstat"),
    "locked memory": (
        f"{SYSTEM}Last error:\nCall to ibv_reg_mr_iova2 failed with error Cannot allocate memory",
        "network", "ulimit -l"),
    "locked memory of a queue": (
        f"{SYSTEM}Last error:\nCall to ibv_create_cq failed with error Cannot allocate memory", "network", "ulimit -l"),
    "no network": (f"{USAGE}Last error:\nError: network IB not found.", "network", "ibv_devinfo"),
    "no plugin": (f"{USAGE}Last error:\nFailed to initialize any NET plugin", "network", "ibv_devinfo"),
    "no interface": (f"{INTERNAL}Last error:\nBootstrap : no socket interface found", "network", "ip -br link"),
    "fabric manager": (
        "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized",
        "environment", "nvidia-fabricmanager"),
    "needs a reset": (
        "AcceleratorError: CUDA error: CUDA-capable device(s) is/are busy or unavailable",
        "xid", "gpu_recovery_action"),
}  # fmt: skip


def failure(
    message: str, *, ranks: int = 16, silent: tuple[int, ...] = (), exits: tuple[RankExit, ...] = ()
) -> FailureRecord:
    nodes = {r: f"h800-0{1 + (r >= 8)}" for r in range(ranks)}
    errors = tuple(
        RankError(node=node, rank=r, time=100.0 + r, message=message) for r, node in nodes.items() if r not in silent
    )
    names = tuple(dict.fromkeys(nodes.values()))
    evidence = Evidence(
        state="FAILED", exit_code=12, nodes=names, errors=errors, exits=exits, ranks=tuple(nodes.items())
    )
    found = classify(evidence)
    assert found is not None
    return found


@pytest.mark.parametrize("name", CASES)
def test_an_error_that_all_ranks_have_is_named_with_its_node_and_advice(name: str) -> None:
    message, kind, word = CASES[name]
    found = failure(message)
    assert (found.kind, found.rank, found.node) == (kind, 0, "h800-01")
    assert found.hint is not None and word in found.hint
    assert "   # on h800-01: " in found.hint


@pytest.mark.parametrize("name", CASES)
def test_the_advice_is_what_to_type_first(tmp_path: Path, name: str) -> None:
    found = failure(CASES[name][0])
    steps = next_steps(found, run=RunDir(tmp_path), checkpoint=None, resolved=ResolvedRecord())
    assert steps[0] == found.hint
    assert any(step.startswith(f"janus-cluster resume {tmp_path}") for step in steps)


@pytest.mark.parametrize("name", ["status as a number", "status by name", "protection error"])
def test_a_rank_that_died_explains_the_errors_of_its_peers(name: str) -> None:
    message = CASES[name][0]
    killed = failure(message, silent=(5,), exits=(RankExit(node="h800-01", rank=5, code=-9),))
    assert (killed.kind, killed.rank) == ("signal", 5)
    silent = failure(message, silent=(5,))
    assert (silent.kind, silent.rank, silent.hint) == ("unknown", 5, None)


def test_ranks_that_only_lost_their_peers_prove_nothing_of_the_network() -> None:
    assert failure(f"{REMOTE}Last error:\nsocketProgress: Connection closed by remote peer").kind == "unknown"


def test_each_advice_is_a_command_with_its_reason() -> None:
    assert all(known.advice.count("   # ") == 1 for known in KNOWN)
