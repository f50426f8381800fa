"""VGGT's aggregator: the published numbers, names and sizes."""

from __future__ import annotations

import shutil

import pytest
import torch
from model_cases import AGGREGATOR, worst
from safetensors.torch import load_file

from janus_cluster.janusvln.model.compile import compile_blocks
from janus_cluster.janusvln.model.vggt import Aggregator
from janus_cluster.janusvln.model.vggt_weights import load_vggt_state, vggt_state_dict
from janus_cluster.modelspec.networks import VggtConfig

pytestmark = pytest.mark.train

TINY = VggtConfig(embed_dim=48, depth=4, num_heads=4, dino_depth=2, dino_num_heads=4, dino_image_size=70)
CASES = ("s1_56x84", "s2_84x56", "s5_84x112", "s2_70x70_nointerp")


@pytest.fixture(scope="module")
def vectors() -> dict[str, torch.Tensor]:
    return load_file(AGGREGATOR)


@pytest.fixture(scope="module")
def aggregator(vectors: dict[str, torch.Tensor]) -> Aggregator:
    built = Aggregator(TINY)
    load_vggt_state(built, {k: v for k, v in vectors.items() if k.startswith("aggregator.")})
    return built


@pytest.mark.parametrize("case", CASES)
def test_one_pass_gives_the_features_of_frame_by_frame(
    case: str, aggregator: Aggregator, vectors: dict[str, torch.Tensor]
) -> None:
    frames = vectors[f"case.{case}.in.frames"].float() / 255
    assert worst(aggregator(frames).flatten(0, 1), vectors[f"case.{case}.out.features"]) < 5e-5
    assert worst(aggregator.patch_tokens(frames)[-1], vectors[f"case.{case}.out.dino_patchtokens"]) < 5e-5


def test_features_are_laid_out_as_the_patch_grid(aggregator: Aggregator) -> None:
    assert aggregator(torch.rand(2, 3, 56, 84)).shape == (4, 6, 96)


def test_earlier_frames_change_the_memory_and_their_order_matters(aggregator: Aggregator) -> None:
    frames = torch.rand(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    memory = aggregator(frames)
    assert worst(memory, aggregator(frames[1:])) > 1e-2
    assert worst(memory, aggregator(frames[[1, 0, 2]])) > 1e-3


def test_aggregator_is_frozen_and_gives_no_graph(aggregator: Aggregator) -> None:
    assert not any(p.requires_grad for p in aggregator.parameters())
    assert not aggregator.training
    assert not aggregator(torch.rand(1, 3, 28, 28, requires_grad=True)).requires_grad


def testrope_table_is_computed_once_per_grid(aggregator: Aggregator) -> None:
    first = aggregator.rope_table(4, 6)
    assert aggregator.rope_table(4, 6)[0] is first[0]
    assert aggregator.rope_table(6, 4)[0] is not first[0]


def test_state_dict_has_the_checkpoint_names_and_values(
    aggregator: Aggregator, vectors: dict[str, torch.Tensor]
) -> None:
    stored = {k: v for k, v in vectors.items() if k.startswith("aggregator.")}
    written = vggt_state_dict(aggregator)
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], stored[name]) for name in stored)


def test_bf16_follows_fp32(vectors: dict[str, torch.Tensor], aggregator: Aggregator) -> None:
    frames = vectors["case.s5_84x112.in.frames"].float() / 255
    half = Aggregator(TINY)
    load_vggt_state(half, {k: v.bfloat16() for k, v in vggt_state_dict(aggregator).items()})
    features = half(frames)
    assert features.dtype == torch.bfloat16
    exact = aggregator(frames)
    assert float((features.float() - exact).norm() / exact.norm()) < 3e-2


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on the CPU needs g++")
def test_compiled_blocks_give_the_published_features(vectors: dict[str, torch.Tensor], aggregator: Aggregator) -> None:
    fast = Aggregator(TINY)
    load_vggt_state(fast, vggt_state_dict(aggregator))
    assert compile_blocks(fast) == TINY.dino_depth + 2 * (TINY.depth - 1)
    torch.compiler.reset()
    # One size of frames only: every further one costs a compilation.
    features = fast(vectors["case.s2_84x56.in.frames"].float() / 255)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert worst(features.flatten(0, 1), vectors["case.s2_84x56.out.features"]) < 5e-5
