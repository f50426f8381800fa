from __future__ import annotations

import pytest

from janus_cluster.job.env import resolve_env
from janus_cluster.job.env_lint import lint_env, select_linted
from janus_cluster.job.profiles import load_env_profile
from janus_cluster.job.resolved import EnvVar
from janus_cluster.job.templates import load_nccl_variable_names


def _lint(**values: str) -> list[str]:
    return lint_env([EnvVar(name=n, value=v, reason="", origin="job") for n, v in values.items()])


@pytest.mark.parametrize(
    ("name", "value", "expected_text"),
    [
        ("NCCL_NTHREADS", "640", "512"),
        ("NCCL_IB_HCA", "mlx5", "prefix"),
        ("NCCL_IB_HCA", "^mlx5_9", "prefix"),
        ("NCCL_SOCKET_IFNAME", "ib0", "=ib0"),
        ("GLOO_SOCKET_IFNAME", "=ib0", "Write ib0"),
        ("NCCL_IB_TIMEOUT", "32", "0 to 31"),
        ("NCCL_IB_TIMEOUT", "long", "0 to 31"),
        ("NCCL_IB_TIMEOUT", "24", "min"),
        ("NCCL_IB_TIMEOUT", "17", "reroute"),
        ("NCCL_ASYNC_ERROR_HANDLING", "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING"),
        ("TORCH_DISTRIBUTED_DEBUG", "DETAIL", "OFF"),
        ("NCCL_P2P_LEVEL", "SYS", "NVLink"),
        ("NCCL_P2P_LEVEL", "5", "NVLink"),
        ("NCCL_DEBUG_SUBSYS", "INIT,ALL", "INIT,NET"),
        ("NCCL_SOKET_IFNAME", "ib0", "did you mean NCCL_SOCKET_IFNAME"),
        ("NCCL_ZZZZZZ", "1", "no variable of this name"),
        ("MASTER_PORT", "29500", "torchrun"),
        ("NCCL_IB_RETRY_CNT", "8", "0 to 7"),
        ("NCCL_IB_GID_INDEX", "0", "RoCE v1"),
        ("NCCL_CROSS_NIC", "3", "0 to 2"),
        ("NCCL_NET_GDR_LEVEL", "5", "legacy"),
        ("NCCL_NET_GDR_LEVEL", "NODE", "not one of"),
        ("NCCL_P2P_DISABLE", "1", "NVLink"),
        ("NCCL_SHM_DISABLE", "1", "/dev/shm"),
        ("NCCL_IGNORE_DISABLED_P2P", "1", "broken NVLink"),
        ("NCCL_SOCKET_NTHREADS", "17", "1 to 16"),
        ("NCCL_BUFFSIZE", "8MB", "Bytes"),
        ("NCCL_DEBUG", "VERBOSE", "not one of"),
        ("TORCH_DISTRIBUTED_DEBUG", "ON", "refuses to start"),
        ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0", "hangs"),
        ("TORCH_NCCL_ENABLE_MONITORING", "0", "hangs"),
        ("TORCH_NCCL_BLOCKING_WAIT", "1", "blocks"),
        ("TORCH_NCCL_ASYNC_EROR_HANDLING", "3", "did you mean TORCH_NCCL_ASYNC_ERROR_HANDLING"),
        ("TORCH_FR_BUFER_SIZE", "2000", "did you mean TORCH_FR_BUFFER_SIZE"),
        ("CUDA_LAUNCH_BLOCKING", "1", "slower"),
        ("CUDA_VISIBLE_DEVICE", "0", "did you mean CUDA_VISIBLE_DEVICES"),
        ("CUDA_DEVICE_MAX_CONNECTIONS", "64", "1 to 32"),
        ("OMP_NUM_THREADS", "0", "above 0"),
        ("OMP_NUM_THREAD", "8", "did you mean OMP_NUM_THREADS"),
    ],
)
def test_doubtful_value_is_named_with_what_to_do(name: str, value: str, expected_text: str) -> None:
    (warning,) = _lint(**{name: value})
    assert warning.startswith(f"{name}={value} (job): ")
    assert expected_text in warning


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NCCL_NTHREADS", "512"),
        ("NCCL_IB_HCA", "=mlx5_0:1,mlx5_1:1"),
        ("NCCL_IB_HCA", "^=mlx5_9"),
        ("NCCL_SOCKET_IFNAME", "=ib0"),
        ("NCCL_SOCKET_IFNAME", "^docker"),
        ("GLOO_SOCKET_IFNAME", "ib0"),
        ("NCCL_IB_TIMEOUT", "18"),
        ("NCCL_IB_TIMEOUT", "23"),
        ("TORCH_DISTRIBUTED_DEBUG", "OFF"),
        ("NCCL_P2P_LEVEL", "NVL"),
        ("NCCL_DEBUG_SUBSYS", "INIT,NET"),
        ("NCCL_BUFFSIZE", "8388608"),
        ("NCCL_IB_RETRY_CNT", "7"),
        ("NCCL_CROSS_NIC", "0"),
        ("NCCL_NET_GDR_LEVEL", "PXB"),
        ("NCCL_P2P_DISABLE", "0"),
        ("NCCL_DEBUG", "WARN"),
        ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3"),
        ("CUDA_LAUNCH_BLOCKING", "0"),
        ("CUDA_VISIBLE_DEVICES", ""),
        ("CUDA_SITE_MODULE", "12.8"),
        ("OMP_NUM_THREADS", "8"),
        ("OMP_NUM_THREADS", "4,2"),
        ("ANYTHING_ELSE", "1"),
    ],
)
def test_good_value_gets_no_warning(name: str, value: str) -> None:
    assert _lint(**{name: value}) == []


def test_no_network_left_is_reported() -> None:
    assert any("no network" in w for w in _lint(NCCL_NET="IB", NCCL_IB_DISABLE="1"))


def test_infiniband_switched_off_hides_a_broken_one() -> None:
    assert any("stays hidden" in w for w in _lint(NCCL_IB_DISABLE="1"))
    assert _lint(NCCL_IB_DISABLE="1", NCCL_NET="Socket") == []


def test_more_sockets_than_nccl_takes_are_reported() -> None:
    assert any("64 sockets" in w for w in _lint(NCCL_SOCKET_NTHREADS="16", NCCL_NSOCKS_PERTHREAD="8"))
    assert _lint(NCCL_SOCKET_NTHREADS="8", NCCL_NSOCKS_PERTHREAD="8") == []


@pytest.mark.parametrize(
    ("torch", "name", "is_reported"),
    [
        ((2, 13), "PYTORCH_CUDA_ALLOC_CONF", True),
        ((2, 8), "PYTORCH_CUDA_ALLOC_CONF", False),
        (None, "PYTORCH_CUDA_ALLOC_CONF", False),
        ((2, 8), "PYTORCH_ALLOC_CONF", True),
        ((2, 9), "PYTORCH_ALLOC_CONF", False),
        ((2, 8), "TORCH_NCCL_TRACE_BUFFER_SIZE", True),
        ((2, 7), "TORCH_NCCL_TRACE_BUFFER_SIZE", False),
        ((2, 7), "TORCH_FR_BUFFER_SIZE", True),
        ((2, 8), "TORCH_FR_BUFFER_SIZE", False),
    ],
)
def test_a_name_is_judged_by_the_torch_that_will_read_it(
    torch: tuple[int, ...] | None, name: str, is_reported: bool
) -> None:
    env = [EnvVar(name=name, value="1", reason="", origin="job")]
    assert bool(lint_env(env, torch_version=torch)) == is_reported


def test_both_names_together_please_every_torch() -> None:
    both = [
        EnvVar(name=n, value="x:1", reason="", origin="job") for n in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    ]
    for torch in ((2, 6), (2, 9), (2, 13), None):
        assert lint_env(both, torch_version=torch) == []


def test_only_variables_of_these_families_are_taken_from_a_shell() -> None:
    environ = {"HOME": "/root", "NCCL_DEBUG": "INFO", "RANK": "3", "OMP_NUM_THREADS": "8"}
    assert [v.name for v in select_linted(environ, origin="shell")] == ["NCCL_DEBUG", "OMP_NUM_THREADS", "RANK"]


@pytest.mark.parametrize("name", ["h800-ib", "h800-roce", "h800-ethernet", "cpu"])
def test_recommended_profiles_are_free_of_warnings(name: str) -> None:
    assert lint_env(resolve_env(load_env_profile(name), {}, {})) == []


def test_the_legacy_profile_is_warned_about() -> None:
    env = resolve_env(load_env_profile("janusvln-legacy"), {}, {})
    named = {w.split("=")[0] for w in lint_env(env)}
    assert named >= {"NCCL_NTHREADS", "NCCL_IB_HCA", "NCCL_P2P_LEVEL", "NCCL_DEBUG_SUBSYS", "TORCH_DISTRIBUTED_DEBUG"}


def test_every_nccl_name_in_a_profile_is_known_or_retired() -> None:
    known = load_nccl_variable_names()
    names = {e["name"] for p in ("h800-ib", "h800-ethernet", "janusvln-legacy") for e in load_env_profile(p)}
    assert {n for n in names if n.startswith("NCCL_")} - known == {"NCCL_ASYNC_ERROR_HANDLING"}
