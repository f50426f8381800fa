"""The vision tower's attention in few calls: what transformers computes window by window."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import build_reference_model, worst
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention

from janus_cluster.janusvln.model.janus import JanusModel
from janus_cluster.janusvln.model.vision import GroupedVisionAttention, PatchProjection, group_windows, plan_vision

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


def test_windows_of_one_length_are_taken_in_place() -> None:
    assert group_windows((0, 4, 8, 12), torch.device("cpu")) == (((None, 4),), None)


def test_every_patch_returns_to_its_place() -> None:
    groups, back = group_windows((0, 2, 5, 7, 8), torch.device("cpu"))
    assert [length for _, length in groups] == [2, 3, 1]
    assert back is not None
    gathered = torch.cat([index for index, _ in groups if index is not None])
    assert gathered[back].tolist() == list(range(8))


class FlashLike:
    """What flash attention computes of packed sequences, from what its kernel is given."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(
        self, module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **given: Any
    ) -> tuple[torch.Tensor, None]:
        """Shapes: [1, H, N, D] in, [1, N, H, D] out."""
        self.num_calls += 1
        boundaries = given["cu_seq_lens_q"]
        # The kernel reads the boundaries on its own device, and takes the longest as a number.
        assert boundaries is given["cu_seq_lens_k"]
        assert (boundaries.device, boundaries.dtype) == (q.device, torch.int32)
        assert type(given["max_length_q"]) is type(given["max_length_k"]) is int
        if q.is_meta:
            return q.transpose(1, 2), None
        lengths = boundaries.diff().tolist()
        assert given["max_length_q"] == given["max_length_k"] == max(lengths)
        parts = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], dim=2).transpose(1, 2), None


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flash_attention_gets_its_windows_where_it_computes(device: str) -> None:
    # With the batch's grid on the host, as training has it. "meta" is a device that is not the host's, as a GPU is.
    grid = torch.tensor([[1, 4, 6], [1, 8, 2]])
    patches = torch.randn(int(grid.prod(1).sum()), 1176, generator=torch.Generator().manual_seed(0))
    model = build_reference_model()
    expected = image_embeds(model, patches, grid, planned=True).detach()
    kernel = FlashLike()
    AttentionInterface.register("flash_like", kernel)
    model.model.visual.config._attn_implementation = "flash_like"
    found = image_embeds(model.to(device), patches.to(device), grid, planned=True)
    assert kernel.num_calls == len(model.model.visual.blocks)
    assert (found.device.type, found.shape) == (device, expected.shape)
    if device == "cpu":
        assert worst(found.detach(), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patches_are_multiplied_as_the_convolution_would(dtype: torch.dtype) -> None:
    embed = build_reference_model().model.visual.patch_embed.to(dtype)
    assert type(embed.proj) is PatchProjection
    patches = torch.randn(6, 1176, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = []
    for kind in (PatchProjection, nn.Conv3d):
        embed.proj.__class__ = kind
        out = embed(patches)
        (gradient,) = torch.autograd.grad(out.square().sum(), embed.proj.weight)
        found.append((out.detach(), gradient))
    (product, its_gradient), (convolution, expected) = found
    # In fp32 it is the convolution itself, and equal to the last bit.
    rounding = 0.0 if dtype == torch.float32 else 2**-7
    assert worst(product, convolution) <= rounding * float(convolution.abs().max())
    assert worst(its_gradient, expected) <= 2 * rounding * float(expected.abs().max())
