from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from janus_cluster.errors import UsageError
from janus_cluster.job.deepspeed_lint import bucket_memory_gb, lint_ds_config
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.job.resources import templates_dir
from janus_cluster.job.templates import load_ds_profile

Resolve = Callable[..., ResolvedJob]
PROFILES = ["zero2", "zero2_offload", "zero3"]


def _set(profile: str, **overrides: Any) -> list[str]:
    lines = [f"deepspeed.profile={profile}"]
    return lines + [f"deepspeed.overrides.{k.replace('__', '.')}={json.dumps(v)}" for k, v in overrides.items()]


def _contains(value: Any, wanted: object) -> bool:
    if isinstance(value, dict):
        return any(_contains(v, wanted) for v in value.values())
    return bool(value == wanted)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_number_is_filled_from_the_training_section(profile: str, resolve: Resolve) -> None:
    config = resolve(sets=[*_set(profile), "training.memory=manual", "training.max_grad_norm=0.5"]).ds_config
    assert config["train_micro_batch_size_per_gpu"] == 1
    assert config["gradient_accumulation_steps"] == 8
    assert config["train_batch_size"] == 128
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"] == {"enabled": True} and config["fp16"] == {"enabled": False}
    assert not _contains(config, "auto")


def test_zero3_has_the_seed_values() -> None:
    profile = load_ds_profile("zero3")
    zero = profile["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["stage3_prefetch_bucket_size"] == 500_000_000
    assert zero["stage3_param_persistence_threshold"] == 1_000_000
    assert zero["stage3_max_live_parameters"] == zero["stage3_max_reuse_distance"] == 1_000_000_000
    assert zero["stage3_gather_16bit_weights_on_model_save"] is True
    assert profile["timers"] == {"throughput": {"enabled": False}}
    assert profile["wall_clock_breakdown"] is False


def test_fp32_switches_both_half_precisions_off(resolve: Resolve) -> None:
    config = resolve(sets=["training.precision=fp32"]).ds_config
    assert not config["bf16"]["enabled"] and not config["fp16"]["enabled"]


def test_a_float_for_a_whole_number_becomes_one(resolve: Resolve) -> None:
    config = resolve(sets=["deepspeed.overrides.zero_optimization.reduce_bucket_size=2e8"]).ds_config
    value = config["zero_optimization"]["reduce_bucket_size"]
    assert value == 200_000_000 and type(value) is int


def test_null_takes_a_key_out(resolve: Resolve) -> None:
    config = resolve(sets=["deepspeed.overrides.zero_optimization.sub_group_size=null"]).ds_config
    assert "sub_group_size" not in config["zero_optimization"]


def test_resolving_leaves_the_profile_as_it_was(resolve: Resolve) -> None:
    before = load_ds_profile("zero3")
    resolve("demo", sets=_set("zero3", zero_optimization__reduce_bucket_size=5))
    assert load_ds_profile("zero3") == before


@pytest.mark.parametrize(
    ("override", "expected_text"),
    [
        ("zero_optimization.reduce_buket_size=5", "did you mean reduce_bucket_size"),
        ("zero_optimization.reduce_bucket_size=2.5", "whole number"),
        ("zero_optimization.reduce_bucket_size=-1", "whole number"),
        ("zero_optimization.reduce_bucket_size=true", "whole number"),
        ("zero_optimization.reduce_bucket_size=auto", "'auto'"),
        ("zero_optimization.reduce_bucket_size.x=1", "single value"),
        ("zero_optimization.overlap_comm=5", "true, false"),
        ("zero_optimization=5", "whole section"),
        ("train_micro_batch_size_per_gpu=4", "training.per_device_batch_size"),
        ("gradient_accumulation_steps=2", "training.gradient_accumulation_steps"),
        ("train_batch_size=64", "16 ranks"),
        ("gradient_clipping=2.0", "training.max_grad_norm"),
        ("bf16.enabled=false", "training.precision"),
        ("optimizer.type=Adam", "training section"),
        ("wall_clock_breakdown.x=1", "single value"),
        ("comms_logger=true", "comms_logger.enabled: true"),
    ],
)
def test_bad_override_is_refused_with_its_key(override: str, expected_text: str, resolve: Resolve) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(sets=[f"deepspeed.overrides.{override}"])
    assert f"deepspeed.overrides.{override.split('=', maxsplit=1)[0]}" in caught.value.message
    assert expected_text in caught.value.message


def test_an_override_that_repeats_the_training_section_is_accepted(resolve: Resolve) -> None:
    config = resolve(sets=["deepspeed.overrides.train_micro_batch_size_per_gpu=1"]).ds_config
    assert config["train_micro_batch_size_per_gpu"] == 1


@pytest.mark.parametrize("profile", PROFILES)
def test_on_the_cpu_buckets_are_small_and_nothing_is_pinned(profile: str, resolve: Resolve) -> None:
    config = resolve("demo", sets=_set(profile)).ds_config
    zero = config["zero_optimization"]
    assert zero["reduce_bucket_size"] <= 5_000_000
    assert zero["overlap_comm"] is False
    assert not _contains(zero.get("offload_optimizer", {}), True)


def test_offload_lets_the_trainer_keep_its_own_optimizer(resolve: Resolve) -> None:
    assert resolve(sets=_set("zero2_offload")).ds_config["zero_force_ds_cpu_optimizer"] is False
    assert "zero_force_ds_cpu_optimizer" not in resolve(sets=_set("zero2")).ds_config


@pytest.mark.parametrize("profile", ["zero2", "zero3"])
def test_shipped_profiles_are_free_of_warnings_on_two_nodes(profile: str, resolve: Resolve) -> None:
    assert lint_ds_config(resolve(sets=_set(profile)).ds_config, world_size=16) == []


def test_offload_param_under_stage_2_is_reported_to_do_nothing(resolve: Resolve) -> None:
    override = {"zero_optimization__offload_param__device": "cpu"}
    config = resolve(sets=_set("zero2", **override)).ds_config
    assert any("does nothing under stage 2" in w for w in lint_ds_config(config, world_size=16))
    config = resolve(sets=_set("zero3", **override)).ds_config
    assert lint_ds_config(config, world_size=16) == []


def test_stage3_keys_under_stage_2_are_reported_to_do_nothing(resolve: Resolve) -> None:
    config = resolve(sets=_set("zero2", zero_optimization__stage3_max_live_parameters=1)).ds_config
    assert any("stage3_max_live_parameters: do nothing" in w for w in lint_ds_config(config, world_size=16))


def test_wrong_batch_arithmetic_is_reported(resolve: Resolve) -> None:
    (warning,) = lint_ds_config(resolve().ds_config, world_size=8)
    assert "train_batch_size 128" in warning and "= 64" in warning


@pytest.mark.parametrize(("bucket", "warned"), [(1_100_000_000, False), (1_111_111_111, False), (1_200_000_000, True)])
def test_buckets_are_judged_against_a_quarter_of_the_memory(bucket: int, warned: bool, resolve: Resolve) -> None:
    config = resolve(
        sets=_set(
            "zero2",
            zero_optimization__reduce_bucket_size=bucket,
            zero_optimization__allgather_bucket_size=bucket,
        )
    ).ds_config
    total_gb = sum(bucket_memory_gb(config).values())
    assert total_gb == pytest.approx(bucket * 2 * 4.5 * 2 / 1e9)
    warnings = lint_ds_config(config, world_size=16)
    assert bool(warnings) is warned
    assert all(f"{total_gb:.1f} GB" in w for w in warnings)


@pytest.mark.parametrize("key", ["wall_clock_breakdown", "comms_logger.enabled", "timers.throughput.enabled"])
def test_settings_that_wait_for_the_device_in_every_step_are_reported(key: str, resolve: Resolve) -> None:
    (warning,) = resolve(sets=[f"deepspeed.overrides.{key}=true"]).warnings
    assert warning.startswith(f"{key}: ")


@pytest.mark.parametrize("off", ["comms_logger.enabled=false", "comms_logger=false", "comms_logger={enabled: false}"])
@pytest.mark.parametrize("profile", [path.stem for path in (templates_dir() / "deepspeed").glob("*.json")])
def test_a_logger_that_is_to_be_off_is_left_out_of_the_json(profile: str, off: str, resolve: Resolve) -> None:
    resolved = resolve(sets=[*_set(profile), "training.memory=manual", f"deepspeed.overrides.{off}"])
    assert "comms_logger" not in resolved.ds_config
    (warning,) = [w for w in resolved.warnings if w.startswith("comms_logger")]
    assert "where the key is present, for every value of `enabled`" in warning and "Remove the override" in warning


@pytest.mark.parametrize("key", ["comms_logger.verbose", "comms_logger.prof_all"])
def test_a_logger_that_is_present_is_reported_to_be_on(key: str, resolve: Resolve) -> None:
    resolved = resolve(sets=[f"deepspeed.overrides.{key}=false"])
    (warning,) = resolved.warnings
    assert warning.startswith(f"{key}: ") and "overlap_comm hides nothing" in warning


def test_no_logger_and_no_override_are_no_warning(resolve: Resolve) -> None:
    resolved = resolve(sets=["deepspeed.overrides.comms_logger=null"])
    assert "comms_logger" not in resolved.ds_config and not resolved.warnings


@pytest.mark.parametrize(
    ("profile", "key", "value"),
    [
        ("zero0", "zero_optimization.overlap_comm", True),
        ("zero0", "zero_optimization.reduce_bucket_size", 5),
        ("zero2", "zero_optimization.allgather_partitions", True),
        ("zero2", "zero_optimization.sub_group_size", 5),
        ("zero3", "zero_optimization.allgather_bucket_size", 5),
        ("zero2", "steps_per_print", 10),
    ],
)
def test_a_key_that_nothing_acts_on_is_reported_to_do_nothing(
    profile: str, key: str, value: object, resolve: Resolve
) -> None:
    resolved = resolve(
        sets=[*_set(profile), "training.memory=manual", f"deepspeed.overrides.{key}={json.dumps(value)}"]
    )
    (warning,) = resolved.warnings
    assert key.rsplit(".", maxsplit=1)[-1] in warning and "nothing" in warning


def test_one_rank_has_nothing_to_shard(resolve: Resolve) -> None:
    config = resolve("demo", sets=["nodes=1"]).ds_config
    assert any("1 rank" in w for w in lint_ds_config(config, world_size=1, device="cpu"))
