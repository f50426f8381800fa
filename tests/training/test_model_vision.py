"""The vision tower's attention in few calls: what transformers computes window by window."""

from __future__ import annotations

import pytest
import torch
from model_cases import build_reference_model, worst
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention

from janus_cluster.training.model.janus import JanusModel
from janus_cluster.training.model.vision import GroupedVisionAttention, group_windows, plan_vision

pytestmark = pytest.mark.train


@pytest.fixture(scope="module")
def model() -> JanusModel:
    return build_reference_model()


def image_embeds(model: JanusModel, patches: torch.Tensor, grid: torch.Tensor, *, planned: bool) -> torch.Tensor:
    plan = plan_vision(model.model.visual, grid, patches.device) if planned else {}
    return torch.cat(model.model.get_image_features(patches, grid, return_dict=True, **plan).pooler_output)


@pytest.mark.parametrize(
    "grid",
    [
        [[1, 4, 4]],
        [[1, 6, 10], [1, 6, 10]],  # windows of four sizes
        [[1, 4, 6], [1, 8, 2], [1, 2, 2]],  # images of unequal sizes
    ],
)
def test_windows_together_give_what_each_gives_alone(grid: list[list[int]], model: JanusModel) -> None:
    grid_thw = torch.tensor(grid)
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(int(grid_thw.prod(1).sum()), 1176, generator=generator)
    blocks = model.model.visual.blocks
    assert all(type(block.attn) is GroupedVisionAttention for block in blocks)
    together = image_embeds(model, patches, grid_thw, planned=True)
    together.square().sum().backward()
    gradient = blocks[0].attn.qkv.weight.grad.clone()
    model.zero_grad()
    try:
        for block in blocks:
            block.attn.__class__ = Qwen2_5_VLVisionAttention
        alone = image_embeds(model, patches, grid_thw, planned=False)
        alone.square().sum().backward()
        assert worst(together.detach(), alone.detach()) < 1e-5
        assert worst(gradient, blocks[0].attn.qkv.weight.grad) < 1e-4 * float(gradient.abs().max())
    finally:
        model.zero_grad()
        for block in blocks:
            block.attn.__class__ = GroupedVisionAttention


def test_windows_of_one_length_are_taken_as_they_lie() -> None:
    assert group_windows((0, 4, 8, 12), torch.device("cpu")) == (((None, 4),), None)


def test_every_patch_returns_to_its_place() -> None:
    groups, back = group_windows((0, 2, 5, 7, 8), torch.device("cpu"))
    assert [length for _, length in groups] == [2, 3, 1]
    assert back is not None
    gathered = torch.cat([index for index, _ in groups if index is not None])
    assert gathered[back].tolist() == list(range(8))
