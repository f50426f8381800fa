from __future__ import annotations

import pytest

from janus_cluster.config.schema import EnvVar
from janus_cluster.render.env import resolve_env
from janus_cluster.render.env_lint import lint_env
from janus_cluster.render.load import load_env_profile, load_nccl_variable_names


def _lint(**values: str) -> list[str]:
    return lint_env([EnvVar(name=n, value=v, reason="", origin="job") for n, v in values.items()])


@pytest.mark.parametrize(
    ("name", "value", "says"),
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
    ],
)
def test_doubtful_value_is_named_with_what_to_do(name: str, value: str, says: str) -> None:
    (warning,) = _lint(**{name: value})
    assert warning.startswith(f"{name}={value} (job): ")
    assert says in warning


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
        ("ANYTHING_ELSE", "1"),
    ],
)
def test_good_value_gets_no_warning(name: str, value: str) -> None:
    assert _lint(**{name: value}) == []


def test_no_network_left_is_said() -> None:
    assert any("no network" in w for w in _lint(NCCL_NET="IB", NCCL_IB_DISABLE="1"))


@pytest.mark.parametrize("name", ["h800-ib", "h800-ethernet", "cpu"])
def test_recommended_profiles_are_free_of_warnings(name: str) -> None:
    assert lint_env(resolve_env(load_env_profile(name), {}, {}, profile_name=name)) == []


def test_the_legacy_profile_is_warned_about() -> None:
    env = resolve_env(load_env_profile("janusvln-legacy"), {}, {}, profile_name="janusvln-legacy")
    named = {w.split("=")[0] for w in lint_env(env)}
    assert named >= {"NCCL_NTHREADS", "NCCL_IB_HCA", "NCCL_P2P_LEVEL", "NCCL_DEBUG_SUBSYS", "TORCH_DISTRIBUTED_DEBUG"}


def test_every_nccl_name_in_a_profile_is_known_or_retired() -> None:
    known = load_nccl_variable_names()
    names = {e["name"] for p in ("h800-ib", "h800-ethernet", "janusvln-legacy") for e in load_env_profile(p)}
    assert {n for n in names if n.startswith("NCCL_")} - known == {"NCCL_ASYNC_ERROR_HANDLING"}
