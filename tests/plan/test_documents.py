"""docs/performance.md has the figures that the code computes."""

from __future__ import annotations

from pathlib import Path

import pytest
from plan_jobs import node_gain, setup

from janus_cluster.job.schema import Data
from janus_cluster.modelspec.sizes import Sizes, preset_sizes
from janus_cluster.plan.flops import Work, count_flops
from janus_cluster.plan.hardware import ASSUMED, known_gpus
from janus_cluster.plan.memory import layer_bytes_per_token
from janus_cluster.plan.report import describe_trust
from janus_cluster.plan.sample import Sample, plan_sample
from janus_cluster.plan.time import LOGGED_STEP_S, plan_step, predecessor_step

PAGE = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
FLAT = " ".join(PAGE.split())
H800 = known_gpus()["h800"]


@pytest.mark.parametrize(
    ("label", "preset", "mode", "work"),
    [
        ("7B, predecessor", "7b", "pad", Work(whole_recompute=True, whole_vggt=True, head_on_all=True)),
        ("7B, crop, everything recomputed, as usually", "7b", "crop", Work(whole_recompute=True)),
        ("7B, crop, recomputed as torch does it", "7b", "crop", Work()),
        ("7B, crop, nothing recomputed", "7b", "crop", Work(recompute_every=0)),
        ("3B, crop, nothing recomputed", "3b", "crop", Work(recompute_every=0)),
    ],
)
def test_the_table_of_operations_is_the_one_that_is_computed(label: str, preset: str, mode: str, work: Work) -> None:
    flops = count_flops(
        preset_sizes(f"qwen2.5-vl-{preset}"), plan_sample(Data.model_validate({"image_mode": mode})), work
    )
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| {label}")]
    values = [float(cell) for cell in row.strip("| ").split("|")[1:]]
    parts = (
        flops.vision,
        flops.vggt,
        flops.llm_forward,
        flops.llm_backward,
        flops.recompute,
        flops.mergers,
        flops.head,
    )
    assert values == pytest.approx([part / 1e12 for part in (*parts, flops.total)], abs=0.051)


@pytest.mark.parametrize("preset", ["7b", "3b"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_table_of_two_nodes_is_the_one_that_is_computed(sample: Sample, preset: str, stage: int) -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith(f"| {preset.upper()} ZeRO-{stage} |")]
    if not rows:
        assert (preset, stage) == ("3b", 3)
        return
    sizes = preset_sizes(f"qwen2.5-vl-{preset}")
    keys = {"deepspeed__profile": f"zero{stage}", "training__gradient_checkpointing": False}
    one, two, double = (
        plan_step(sizes, sample, setup(**keys, nodes=n, training__gradient_accumulation_steps=a), H800)
        for n, a in ((1, 8), (2, 4), (2, 8))
    )
    gains = [node_gain(sizes, sample, setup(**keys), H800, same_batch=same) for same in (True, False)]
    cells = [cell.split("(")[0].strip() for cell in rows[0].strip("| ").split("|")[1:]]
    on_wire, exposed = (float(part) for part in cells.pop().split("/"))
    documented = [*(float(cell) for cell in cells), on_wire, exposed]
    computed = [one.total, two.total, gains[0], double.total, gains[1], double.communication, double.exposed]
    assert documented == pytest.approx(computed, abs=0.0051)


def test_the_assumptions_are_the_ones_that_are_used(sizes: Sizes) -> None:
    assert f"| {ASSUMED.efficiency:.0%} |".replace("%", " %") in PAGE
    assert f"{H800.bus_one_node_gb_per_s:.0f} GB/s on one node, {H800.bus_two_nodes_gb_per_s:.0f} on two" in PAGE
    assert f"{ASSUMED.module_call_s * 1e3:.2f} ms of host time" in PAGE
    assert f"{ASSUMED.reserve_gb:.0f} GB of {H800.memory_gb:.0f}" in PAGE
    assert f"{ASSUMED.hidden:.0%} of a collective".replace("%", " %") in PAGE
    assert f"{layer_bytes_per_token(sizes, 2) / 1e3:.0f} KB for 7B" in PAGE


def test_the_logged_run_is_described_as_it_is_reproduced() -> None:
    predicted = predecessor_step()
    assert f"{predicted.total:.1f} s, −{1 - predicted.total / LOGGED_STEP_S:.0%}".replace("%", " %") in FLAT
    assert f"{predicted.hooks:.0f} s of it are hooks" in FLAT
    assert f"reproduced as {predicted.total:.1f} s" in describe_trust()
