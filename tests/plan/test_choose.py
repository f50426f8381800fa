"""Which option is taken, and what the command prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plan_jobs import RANKS, job

from janus_cluster.cli.plan import make_plan
from janus_cluster.errors import UsageError
from janus_cluster.modelspec.sizes import Sizes
from janus_cluster.plan.choose import (
    Option,
    choose,
    keys_of,
    options_to_type,
    plan_option,
    plan_options,
    with_wanted_batch,
)
from janus_cluster.plan.hardware import known_gpus

H800 = known_gpus()["h800"]


def options(sizes: Sizes, **keys: Any) -> list[Option]:
    return plan_options(job(**keys), sizes=sizes, ranks_per_node=RANKS, gpu=H800, nodes=(1, 2))


def test_what_fits_comes_first_the_fastest_before_the_rest(sizes: Sizes) -> None:
    found = options(sizes, deepspeed__profile="zero0")
    fitting = [o for o in found if o.fits]
    assert 0 < len(fitting) < len(found)
    assert found[: len(fitting)] == fitting
    assert [o.time.total for o in fitting] == sorted(o.time.total for o in fitting)
    assert all(o.memory.total <= 74e9 for o in fitting)
    assert all(o.memory.total > 74e9 for o in found[len(fitting) :])


def test_every_option_learns_the_same(sizes: Sizes) -> None:
    found = options(sizes, training__gradient_accumulation_steps=4, data__history=4)
    assert {o.setup.effective_batch for o in found} == {32}
    assert {o.sample.tokens for o in found} == {2337}
    assert {o.setup.nodes for o in found} == {1, 2}


def test_no_more_is_recomputed_than_has_to_be(sizes: Sizes) -> None:
    for option in options(sizes):
        if not option.fits:
            continue
        less = {0: None, 4: False, 2: 4, 1: 2}[option.setup.work.recompute_every]
        if less is None:
            continue
        update = {"gradient_checkpointing": bool(less), "gradient_checkpointing_every": less or 1}
        training = option.job.training.model_copy(update=update)
        lighter = option.job.model_copy(update={"training": training})
        assert not plan_option(lighter, sizes=sizes, ranks_per_node=RANKS, gpu=H800).fits


def test_the_choice_is_near_the_fastest_and_the_roomiest_of_those(sizes: Sizes) -> None:
    found = options(sizes)
    for nodes in (1, 2):
        chosen = choose(found, nodes=nodes)
        assert chosen is not None
        rivals = [o for o in found if o.setup.nodes == nodes and o.fits]
        fastest = min(o.time.total for o in rivals)
        assert chosen.time.total <= 1.05 * fastest
        simple = [o for o in rivals if o.time.total <= 1.05 * fastest and o.profile in ("zero1", "zero2")]
        assert chosen.memory.total == min(o.memory.total for o in simple)


def test_where_nothing_fits_nothing_is_chosen(sizes: Sizes) -> None:
    small = replace(H800, memory_gb=20.0)
    found = plan_options(job(), sizes=sizes, ranks_per_node=RANKS, gpu=small, nodes=(1, 2))
    assert found
    assert not any(o.fits for o in found)
    assert choose(found, nodes=1) is None


def test_the_options_to_type_make_the_chosen_job(sizes: Sizes) -> None:
    before = job()
    chosen = choose(options(sizes), nodes=1)
    assert chosen is not None
    typed = dict(text.removeprefix("--set ").split("=") for text in options_to_type(chosen, before))
    assert keys_of(before) | typed == keys_of(before) | keys_of(chosen.job)
    assert typed == {"deepspeed.profile": "zero2", "training.gradient_checkpointing": "false"}
    assert options_to_type(chosen, chosen.job) == []


def test_another_number_of_nodes_keeps_the_batch_that_the_job_means() -> None:
    two = job(nodes=1, training__effective_batch_size=128)
    assert with_wanted_batch(two, ranks_per_node=RANKS).training.gradient_accumulation_steps == 16
    odd = job(nodes=2, training__effective_batch_size=24)
    with pytest.raises(UsageError, match="24: not a multiple of per_device_batch_size 1 × 16 ranks"):
        with_wanted_batch(odd, ranks_per_node=RANKS)


def test_a_plan_needs_no_variable_and_no_file() -> None:
    plan = make_plan(None, nodes=None, sets=[], gpu_name=None, samples=None, environ={})
    assert plan.sizes.name == "qwen2.5-vl-7b"
    assert plan.chosen is not None
    assert plan.chosen.setup.nodes == 2
    assert plan.as_it_is.setup.effective_batch == 128
    assert any("published sizes" in note for note in plan.notes)


def test_compat_predecessor_is_planned_with_its_padded_frames() -> None:
    plan = make_plan(None, nodes=1, sets=["compat=predecessor"], gpu_name="h800", samples=1000, environ={})
    assert plan.as_it_is.sample.tokens == 5151
    assert {o.setup.nodes for o in plan.options} == {1}
    assert plan.epoch_samples == 1000


def test_hours_of_an_epoch_are_its_samples_at_the_steps_pace(sizes: Sizes) -> None:
    (first, *_) = options(sizes)
    steps = 6400 / first.setup.effective_batch
    assert first.epoch_hours(6400) == pytest.approx(steps * first.time.total / 3600)


def run(tmp_path: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if k not in ("MODEL_PATH", "VGGT_MODEL_PATH", "DATA_ROOT")}
    command = [sys.executable, "-m", "janus_cluster.cli", "plan", *argv]
    return subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False, timeout=600)


def test_the_command_prints_table_choice_and_how_far_to_trust_it(tmp_path: Path) -> None:
    done = run(tmp_path, "--nodes", "2", "--samples", "50000")
    assert done.returncode == 0, done.stderr
    assert "s/step" in done.stdout
    assert "hours for 50,000 samples" in done.stdout
    assert "choice   zero2, batch 1×8, recompute none, 2 nodes" in done.stdout
    assert "type     nothing: the job has it" in done.stdout
    assert "training.memory: auto takes zero2, batch 1×8, recompute none" in done.stdout
    output = " ".join(done.stdout.split())
    assert "Never compared with an H800 run" in output
    assert "54.7 s a step of 64) is reproduced as" in output
    assert list(tmp_path.iterdir()) == []


def test_what_a_manual_job_lacks_is_there_to_be_typed(tmp_path: Path) -> None:
    manual = ("training.memory=manual", "deepspeed.profile=zero3", "training.gradient_checkpointing=true")
    done = run(tmp_path, "--nodes", "2", *(word for text in manual for word in ("--set", text)))
    assert "type     --set deepspeed.profile=zero2 --set training.gradient_checkpointing=false" in done.stdout
    assert "1.31× as fast as the job as given" in " ".join(done.stdout.split())


def test_the_json_of_a_plan_keeps_its_contract(tmp_path: Path) -> None:
    value = json.loads(run(tmp_path, "--gpu", "h200", "--json").stdout)
    assert list(value) == [
        "job", "gpu", "network", "effective_batch", "sample", "epoch_samples", "as_it_is", "options", "choice",
        "reason", "type", "other_samples", "assumptions", "notes", "trust",
    ]  # fmt: skip
    assert value["gpu"] == "H200"
    assert list(value["options"][0]) == [
        "nodes", "profile", "micro_batch", "accumulation", "recompute_every", "fits", "tokens", "tflop_per_sample",
        "memory_gb", "memory_limit_gb", "step_s", "epoch_hours",
    ]  # fmt: skip


def test_bad_input_ends_with_2_and_shows_what_to_do(tmp_path: Path) -> None:
    for argv, words in (
        (["--nodes", "65"], ["--nodes: nodes: 65", "less than or equal to 64"]),
        (["--nodes", "3"], ["128", "24 ranks", "effective_batch_size=120 or --set training.effective_batch_size=144"]),
        (["absent.yaml"], ["absent.yaml", "no such job file"]),
        (["--set", "data.history=33"], ["data.max_length", "8192", "--set data.max_length="]),
    ):
        done = run(tmp_path, *argv)
        assert done.returncode == 2, done.stdout
        assert all(word in done.stderr for word in words), done.stderr
