"""preflight.thresholds replaces values of the profile, and nothing that the profile does not have."""

from __future__ import annotations

import pytest
from test_resolve import refused, resolve

HCA = "preflight.thresholds.hca"


def test_a_sites_own_values_replace_those_of_the_profile() -> None:
    before = resolve("train_2node").preflight_thresholds
    changed = resolve(
        "train_2node",
        f"{HCA}.ports_min=4",
        "preflight.thresholds.rails.busbw_gb_per_s.fail_below=20.5",
        "preflight.thresholds.gpu.processes_allowed=[my-monitor]",
    ).preflight_thresholds
    assert changed["hca"] == before["hca"] | {"ports_min": 4}
    assert changed["rails"]["busbw_gb_per_s"] == before["rails"]["busbw_gb_per_s"] | {"fail_below": 20.5}
    assert changed["gpu"]["processes_allowed"] == ["my-monitor"]
    assert changed["limits"] == before["limits"]


def floors(*sets: str) -> tuple[float, float, float, float]:
    """fail_below of: a rail alone, all at once, all ranks of one node and of two."""
    profile = resolve("train_2node", *sets).preflight_thresholds
    of_ranks = [row["fail_below"] for row in profile["all_reduce"]["busbw_gb_per_s"].values()]
    rails = profile["rails"]
    return (rails["busbw_gb_per_s"]["fail_below"], rails["together_gb_per_s"]["fail_below"], *of_ranks)


def test_the_floors_follow_the_number_and_rate_of_the_rails() -> None:
    assert floors() == (43, 43, 135, 130)
    assert floors(f"{HCA}.rate_gb_per_s_min=200") == (21.5, 21.5, 135, 130)
    assert floors(f"{HCA}.ports_min=4") == (43, 21.5, 135, 130)
    # 4 × 200 Gb/s are 100 GB/s for all ranks of a node.
    assert floors(f"{HCA}.ports_min=4", f"{HCA}.rate_gb_per_s_min=200") == (21.5, 10.75, 80, 80)
    own = "preflight.thresholds.rails.busbw_gb_per_s.fail_below=15"
    assert floors(f"{HCA}.rate_gb_per_s_min=200", own)[0] == 15
    assert "0.5 for this site" in str(
        resolve("train_2node", f"{HCA}.rate_gb_per_s_min=200").preflight_thresholds["rails"]["busbw_gb_per_s"]
    )


def test_the_floors_follow_the_part_as_far_as_the_network_carries_it() -> None:
    part = "preflight.thresholds.part=h200"
    assert floors(part) == (43, 43, 304, 260)
    # 8 × 200 Gb/s are 200 GB/s for all ranks of a node, over Ethernet nothing of the GPU's counts.
    assert floors(part, "environment.profile=h800-hdr") == (21.5, 21.5, 304, 160)
    assert floors(part, "environment.profile=h800-ethernet")[2:] == (304, 1.5)
    assert floors("environment.profile=a800-ib") == (21.5, 21.5, 135, 130)
    assert floors("environment.profile=h800-roce-400") == (40, 34, 135, 130)
    resolved = resolve("train_2node", part)
    assert (resolved.preflight_profile, resolved.preflight_thresholds["part"]) == ("h800-ib", "h200")
    assert resolved.preflight_thresholds["gpu"]["name"] == "NVIDIA H200"


def test_a_kind_of_gpu_without_figures_is_a_warning_with_the_near_name() -> None:
    (warning,) = [w for w in resolve("train_2node", "hardware.gpu_type=h80").warnings if "gpu_type" in w]
    assert "did you mean h800?" in warning and "--set slurm.gres=gpu:h80:8" in warning
    for name in ("H800", "h20", '""'):
        assert not [w for w in resolve("train_2node", f"hardware.gpu_type={name}").warnings if "gpu_type" in w]


def test_a_row_of_floors_takes_the_one_that_the_profile_leaves_out() -> None:
    limits = resolve("train_2node", "preflight.thresholds.limits.memory_gib.fail_below=128").preflight_thresholds[
        "limits"
    ]
    assert (limits["memory_gib"]["warn_below"], limits["memory_gib"]["fail_below"]) == (256, 128)
    assert "did you mean fail_below?" in refused("train_2node", "preflight.thresholds.limits.memory_gib.fails_below=1")


def test_a_site_with_roce_has_a_profile_of_its_own() -> None:
    resolved = resolve("train_2node", "environment.profile=h800-roce")
    assert resolved.preflight_profile == "h800-roce"
    assert resolved.preflight_thresholds["hca"]["link_layer"] == "Ethernet"
    assert {v.name: v.value for v in resolved.env}["NCCL_NET"] == "IB"


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (f"{HCA}.port_min=4", ("preflight.thresholds.hca.port_min", "h800-ib", "did you mean ports_min?")),
        ("preflight.thresholds.hcas.ports_min=4", ("preflight.thresholds.hcas", "did you mean hca?")),
        (f"{HCA}.ports_min=four", ("preflight.thresholds.hca.ports_min", "'four'", "a number")),
        (f"{HCA}.ports_min=-1", ("-1", "a number from 0 on")),
        (f"{HCA}.ports_min=true", ("True", "a number")),
        (f"{HCA}.wanted=1", ("wanted", "true or false")),
        (f"{HCA}=4", ("preflight.thresholds.hca:", "a mapping")),
        ("preflight.thresholds.gpu.processes_allowed=x", ("processes_allowed", "a list")),
    ],
)
def test_what_the_profile_does_not_have_is_refused_with_what_to_type(option: str, words: tuple[str, ...]) -> None:
    message = refused("train_2node", option)
    assert all(word in message for word in words), message


def test_another_value_is_another_configuration() -> None:
    assert resolve("train_2node").config_hash != resolve("train_2node", f"{HCA}.ports_min=4").config_hash
