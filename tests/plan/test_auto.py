"""training.memory: auto: what it chooses, what it leaves alone, and its error where nothing fits."""

from __future__ import annotations

import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from janus_cluster.cli.plan import make_plan
from janus_cluster.errors import UsageError
from janus_cluster.job.load import LoadedJob, load_job, value_of, with_values
from janus_cluster.job.resolve import resolve_fallbacks, resolve_job
from janus_cluster.job.resolved import MemoryPlan
from janus_cluster.job.resources import jobs_dir
from janus_cluster.plan.auto import ORIGIN, describe_memory, plan_memory_keys
from janus_cluster.plan.choose import DECIDED

ENVIRON = {"MODEL_PATH": "/models/qwen", "VGGT_MODEL_PATH": "/models/vggt", "DATA_ROOT": "/data/r2r"}
LITTLE = "hardware.gpu_memory_gb=24"


def load(
    *sets: str,
    nodes: int = 2,
    job: str = "train_{}node",
    batch: int | None = None,
    environ: dict[str, str] | None = None,
) -> LoadedJob:
    path = jobs_dir() / f"{job.format(min(nodes, 2))}.yaml"
    options = {"nodes": nodes, "training.effective_batch_size": batch}
    return load_job(path, sets=sets, environ=ENVIRON | (environ or {}), options=options)


def choose(loaded: LoadedJob) -> tuple[LoadedJob, MemoryPlan]:
    after, memory = plan_memory_keys(loaded)
    assert memory is not None
    return after, memory


def batch_of(loaded: LoadedJob) -> int:
    training = loaded.config.training
    return training.per_device_batch_size * training.gradient_accumulation_steps * loaded.config.nodes * 8


def test_a_manual_job_and_one_that_trains_nothing_stay_as_they_are() -> None:
    for loaded in (load("training.memory=manual"), load("kind=preflight")):
        assert plan_memory_keys(loaded) == (loaded, None)


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_shipped_jobs_get_what_plan_would_take_and_what_is_in_their_comments(nodes: int) -> None:
    loaded = load(nodes=nodes)
    after, memory = choose(loaded)
    planned = make_plan(None, nodes=nodes, sets=["training.memory=manual"], gpu_name=None, samples=None, environ={})
    assert planned.chosen is not None
    assert {key: value_of(after.config, key) for key in DECIDED} == {
        key: value_of(planned.chosen.job, key) for key in DECIDED
    }
    assert memory.option.words == "zero2, batch 1×8, recompute none"
    output = f"{memory.option.planned_gb:.0f} of {memory.limit_gb:.0f} GB planned"
    text = (jobs_dir() / f"train_{nodes}node.yaml").read_text(encoding="utf-8")
    assert output in " ".join(text.replace("#", " ").split())
    # The values in the file are that choice, so that manual is no worse.
    assert after.config == loaded.config


def test_every_chosen_key_has_its_origin() -> None:
    after, _ = choose(load())
    assert {after.origins[key] for key in DECIDED} == {ORIGIN} == {"training.memory: auto"}
    assert after.origins["training.learning_rate"] != ORIGIN


@pytest.mark.slow
@pytest.mark.parametrize("gigabytes", [20, 30, 50, 80, 141])
@pytest.mark.parametrize("nodes", [1, 2])
def test_whatever_is_chosen_fits_and_leaves_the_effective_batch(nodes: int, gigabytes: int) -> None:
    for sets in ((), ("model.preset=qwen2.5-vl-3b",), ("training.lora.enabled=true",), ("compat=predecessor",)):
        loaded = load(f"hardware.gpu_memory_gb={gigabytes}", *sets, nodes=nodes)
        try:
            after, memory = choose(loaded)
        except UsageError as e:
            assert gigabytes < 80
            assert "nothing fits" in e.message
            continue
        assert batch_of(after) == loaded.config.training.effective_batch_size
        needs = [option.planned_gb for option in memory.options]
        assert needs[0] <= memory.limit_gb == gigabytes - 6
        assert len(needs) <= 4
        assert all(b <= 0.9 * a + 1e-3 for a, b in pairwise(needs))


def test_what_was_typed_stays_and_the_rest_follows_from_it() -> None:
    after, memory = choose(load("deepspeed.profile=zero1", "training.gradient_accumulation_steps=4"))
    training = after.config.training
    assert (after.config.deepspeed.profile, training.gradient_accumulation_steps) == ("zero1", 4)
    assert (training.per_device_batch_size, batch_of(after)) == (2, 128)
    assert after.origins["training.gradient_accumulation_steps"] == "--set"
    assert after.origins["training.per_device_batch_size"] == ORIGIN
    assert {option.keys["deepspeed.profile"] for option in memory.options} == {"zero1"}
    assert {option.keys["training.gradient_accumulation_steps"] for option in memory.options} == {4}


@pytest.mark.parametrize(
    ("sets", "key", "values"),
    [
        (["training.gradient_checkpointing=true"], "training.gradient_checkpointing", {True}),
        (["training.gradient_checkpointing=false"], "training.gradient_checkpointing", {False}),
        (["training.gradient_checkpointing_every=3"], "training.gradient_checkpointing_every", {1, 3}),
        (["deepspeed.profile=zero0", LITTLE], "deepspeed.profile", set()),
    ],
)
def test_a_typed_key_holds_in_every_option(sets: list[str], key: str, values: set[object]) -> None:
    loaded = load(*sets)
    if not values:
        with pytest.raises(UsageError, match="zero0"):
            plan_memory_keys(loaded)
        return
    _, memory = choose(loaded)
    assert {option.keys[key] for option in memory.options} <= values


def test_a_variable_of_the_shell_counts_as_typed_and_its_default_does_not() -> None:
    after, _ = choose(load(environ={"PER_DEVICE_BATCH": "4"}))
    assert after.config.training.per_device_batch_size == 4
    assert after.origins["training.per_device_batch_size"].startswith("$PER_DEVICE_BATCH")
    assert batch_of(after) == 128
    assert choose(load())[0].origins["training.per_device_batch_size"] == ORIGIN


def test_what_replaces_the_job_files_values_is_reported() -> None:
    loaded = load(job="demo", nodes=2)
    with pytest.raises(UsageError):
        plan_memory_keys(load("training.memory=auto", job="demo"))
    assert plan_memory_keys(loaded)[1] is None
    sets = ("training.memory=auto", "hardware.gpu_memory_gb=4", "hardware.processes_per_node=2")
    _, memory = choose(load(*sets, job="demo"))
    (output,) = [line for line in describe_memory(memory) if "instead of the values in" in line]
    assert "demo.yaml" in output
    assert "deepspeed.profile: zero3 → " in output


def test_hardware_that_is_not_known_is_refused_until_its_memory_is_given() -> None:
    for sets, words in (
        (
            ("hardware.gpu_type=a100",),
            ["'a100'", "h20, h200, h800", "hardware.gpu_memory_gb", "training.memory=manual"],
        ),
        (('hardware.gpu_type=""',), ["''", "training.memory=manual"]),
        (("hardware.device=cpu",), ["hardware.device is cpu", "hardware.gpu_memory_gb", "training.memory=manual"]),
    ):
        with pytest.raises(UsageError) as caught:
            plan_memory_keys(load(*sets))
        output = f"{caught.value.message} {caught.value.hint}"
        assert all(word in output for word in words), output
        _, memory = choose(load(*sets, "hardware.gpu_memory_gb=100"))
        # Only a GPU has a context and NCCL to keep room for.
        assert memory.limit_gb == (100 if "cpu" in sets[0] else 94)
        assert "s a step" not in describe_memory(memory)[0]


def test_a_known_gpu_may_be_given_other_memory() -> None:
    _, memory = choose(load("hardware.gpu_memory_gb=60"))
    assert (memory.gpu, memory.gpu_memory_gb, memory.limit_gb) == ("H800", 60, 54)
    assert memory.option.planned_gb <= 54


@pytest.mark.parametrize(
    ("sets", "nodes"), [([LITTLE], 1), ([LITTLE, "deepspeed.profile=zero1"], 2), (["hardware.gpu_memory_gb=17"], 2)]
)
def test_where_nothing_fits_the_nearest_is_named_and_what_is_to_be_typed_helps(sets: list[str], nodes: int) -> None:
    with pytest.raises(UsageError) as caught:
        plan_memory_keys(load(*sets, nodes=nodes))
    error = caught.value
    assert "nothing fits into" in error.message
    assert "nearest: " in error.message
    assert "--set training.memory=manual" in (error.hint or "")
    way = (error.hint or "").split("; or ")[0]
    if way.startswith("leave out"):
        sets = [text for text in sets if text.partition("=")[0] not in way]
    elif way.startswith("--nodes"):
        nodes = int(way.removeprefix("--nodes"))
    else:
        sets = [*sets, shlex.split(way)[1]]
    choose(load(*sets, nodes=nodes))


def test_a_batch_that_the_ranks_do_not_divide_is_refused() -> None:
    with pytest.raises(UsageError, match="effective batch of 24 on 16 ranks"):
        plan_memory_keys(load(batch=24))
    with pytest.raises(UsageError, match=r"per_device_batch_size: 3"):
        plan_memory_keys(load("training.per_device_batch_size=3"))


def test_each_option_holds_what_resolving_its_keys_gives() -> None:
    loaded = load()
    chosen, memory = choose(loaded)
    assert len(memory.options) > 1
    plain = resolve_job(
        chosen, run_dir=Path("/r"), cluster="slurm", environ=ENVIRON, cwd=Path("/"), python="python", memory=memory
    )
    chain = resolve_fallbacks(plain)
    assert [(r.bundle, r.fallback_bundle) for r in chain[:-1]] == [(n, n + 1) for n in range(1, len(chain))]
    assert chain[-1].fallback_bundle is None
    for option, fallback in zip(memory.options, chain, strict=True):
        sets = ["training.memory=manual", *(f"{key}={str(value).lower()}" for key, value in option.keys.items())]
        resolved = resolve_job(
            load(*sets), run_dir=Path("/r"), cluster="slurm", environ=ENVIRON, cwd=Path("/"), python="python"
        )
        assert fallback.ds_config == resolved.ds_config
        assert fallback.job == with_values(plain.job, option.keys)
        assert resolved.effective_batch_size == 128


def test_what_has_run_out_of_memory_is_not_planned_again() -> None:
    loaded = load()
    _, first = choose(loaded)
    _, second = plan_memory_keys(loaded, below_gb=first.options[1].planned_gb)
    assert second is not None
    assert second.option.planned_gb < first.options[1].planned_gb
    assert second.out_of_memory_gb == first.options[1].planned_gb
    with pytest.raises(UsageError, match="ran out of memory"):
        plan_memory_keys(loaded, below_gb=first.options[-1].planned_gb / 2)


def test_an_override_in_deepspeeds_own_terms_pins_the_key_that_it_repeats() -> None:
    _, memory = choose(load("deepspeed.overrides.train_micro_batch_size_per_gpu=1"))
    assert {option.keys["training.per_device_batch_size"] for option in memory.options} == {1}


def test_weights_that_only_the_nodes_can_see_are_taken_for_the_presets(tmp_path: Path) -> None:
    _, expected = choose(load())
    _, memory = choose(load(f"model.path={tmp_path}"))
    assert memory.options == expected.options
