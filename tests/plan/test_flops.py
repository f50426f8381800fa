"""Operations of a sample: the budget that the levers were chosen by, and how it moves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from janus_cluster.job.schema import Data, Lora, Tune
from janus_cluster.modelspec.sizes import Sizes, preset_sizes
from janus_cluster.plan.flops import Work, count_flops
from janus_cluster.plan.sample import Sample, plan_sample

PREDECESSOR = Work(whole_recompute=True, whole_vggt=True, head_on_all=True)


@pytest.mark.parametrize(
    ("preset", "mode", "work", "tflop"),
    [
        ("qwen2.5-vl-7b", "pad", PREDECESSOR, 396),
        ("qwen2.5-vl-7b", "crop", Work(whole_recompute=True), 277),
        ("qwen2.5-vl-7b", "crop", Work(recompute_every=0), 223),
        ("qwen2.5-vl-3b", "crop", Work(recompute_every=0), 132),
    ],
)
def test_the_budget_of_nine_frames_is_the_known_one(preset: str, mode: str, work: Work, tflop: float) -> None:
    sample = plan_sample(Data.model_validate({"image_mode": mode}))
    assert count_flops(preset_sizes(preset), sample, work).total / 1e12 == pytest.approx(tflop, rel=0.005)


def test_recomputing_leaves_out_the_last_product_of_each_layer(sizes: Sizes, sample: Sample) -> None:
    whole = count_flops(sizes, sample, Work(whole_recompute=True))
    real = count_flops(sizes, sample, Work())
    assert whole.recompute == whole.llm_forward
    assert whole.recompute - real.recompute == 2 * sample.tokens * 18944 * 3584 * 28
    assert count_flops(sizes, sample, Work(recompute_every=2)).recompute == pytest.approx(real.recompute / 2)
    assert count_flops(sizes, sample, Work(recompute_every=3)).recompute == pytest.approx(real.recompute * 10 / 28)
    assert whole.model == real.model


def test_vggt_grows_faster_than_its_frames_because_each_sees_those_before_it(sizes: Sizes) -> None:
    work = Work(whole_vggt=True)
    few, many = (count_flops(sizes, plan_sample(Data(history=n - 1)), work) for n in (3, 9))
    assert many.dino == pytest.approx(3 * few.dino)
    assert many.vggt_frame == pytest.approx(3 * few.vggt_frame)
    tokens = 1610 + 5
    linear = 24 * 24 * 1024**2 * tokens
    pair = 24 * 4 * tokens**2 * 1024
    assert few.vggt_global == pytest.approx(3 * linear + 6 * pair)
    assert many.vggt_global == pytest.approx(9 * linear + 45 * pair)


def test_what_does_not_learn_costs_no_backward_pass(sizes: Sizes, sample: Sample) -> None:
    everything = count_flops(sizes, sample, Work())
    adapters = count_flops(sizes, sample, Work(lora=Lora(enabled=True)))
    frozen = count_flops(sizes, sample, Work(tune=Tune(llm=False, projector=False, vggt_merger=False)))
    vision = count_flops(sizes, sample, Work(tune=Tune(vision=True), recompute_every=0))
    assert everything.llm_backward == pytest.approx(2 * everything.llm_forward)
    assert everything.llm_forward < adapters.llm_backward < 0.7 * everything.llm_backward
    assert (frozen.llm_backward, frozen.recompute) == (0, 0)
    assert vision.vision == pytest.approx(3 * everything.vision, rel=0.01)


def test_a_causal_mask_halves_attention_and_labels_shrink_the_head(sizes: Sizes, sample: Sample) -> None:
    causal, square = (count_flops(sizes, sample, Work(causal=c)) for c in (True, False))
    assert square.llm_forward - causal.llm_forward == pytest.approx(2 * sample.tokens**2 * 3584 * 28)
    labels, everywhere = (count_flops(sizes, sample, Work(head_on_all=a)).head for a in (False, True))
    assert everywhere / labels == pytest.approx(3909 / 160, rel=0.01)


def test_longer_text_costs_the_language_model_only(sizes: Sizes, sample: Sample) -> None:
    longer = replace(sample, text_tokens=sample.text_tokens + 500)
    before, after = (count_flops(sizes, s, Work()) for s in (sample, longer))
    assert after.llm_forward > before.llm_forward
    assert (after.vggt, after.vision) == (before.vggt, before.vision)
