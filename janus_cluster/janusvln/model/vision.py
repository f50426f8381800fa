"""Qwen's vision tower in few kernels: windows of one length share a call, and what follows from the grid is kept.

transformers runs one attention call a window where flash attention is not installed: 30 windows an image, 9 images and
28 blocks are 7,560 calls a micro-step, and asks the device for the window lengths three times a block.
Shape legend: N patches of all images, H heads, D head width.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLVisionAttention,
    apply_rotary_pos_emb_vision,
)
from transformers.utils.generic import is_flash_attention_requested
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

PLANS_KEPT = 64

# For each length: the patches of its windows (None: all patches in order), and the length.
Groups = tuple[tuple[Tensor | None, int], ...]


class GroupedVisionAttention(Qwen2_5_VLVisionAttention):  # type: ignore[misc]
    """The same attention with one call for all windows of a length, exact and without a mask."""

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Shapes: [N, H · D] in and out; cu_seqlens on the host, or there is a wait for the device."""
        if self.config._attn_implementation != "sdpa" or position_embeddings is None:
            out: Tensor = super().forward(hidden_states, cu_seqlens, position_embeddings, max_seqlen, **kwargs)
            return out
        num_patches = hidden_states.shape[0]
        q, k, v = self.qkv(hidden_states).reshape(num_patches, 3, self.num_heads, -1).unbind(1)
        q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        groups, back_N = group_windows(tuple(cu_seqlens.tolist()), hidden_states.device)
        mixed = [self._attend(q, k, v, index, length) for index, length in groups]
        mixed_NHD = mixed[0] if back_N is None else torch.cat(mixed).index_select(0, back_N)
        return self.proj(mixed_NHD.reshape(num_patches, -1))  # type: ignore[no-any-return]

    def _attend(self, q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, index: Tensor | None, length: int) -> Tensor:
        """[n · length, H, D]: attention inside each of the n windows that `index` lists; None: all, in order."""
        parts = (x if index is None else x.index_select(0, index) for x in (q_NHD, k_NHD, v_NHD))
        q, k, v = (x.reshape(-1, length, *x.shape[1:]).transpose(1, 2) for x in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scaling)
        return mixed.transpose(1, 2).flatten(0, 1)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def group_windows(boundaries: tuple[int, ...], device: torch.device) -> tuple[Groups, Tensor | None]:
    """The windows by length, and each patch's new position; None where there is one length and nothing is moved."""
    return _group_windows(boundaries, device)


@lru_cache(maxsize=PLANS_KEPT)
def _group_windows(boundaries: tuple[int, ...], device: torch.device) -> tuple[Groups, Tensor | None]:
    windows: dict[int, list[int]] = {}
    for start, end in pairwise(boundaries):
        windows.setdefault(end - start, []).extend(range(start, end))
    if len(windows) == 1:
        return ((None, next(iter(windows))),), None
    back = torch.tensor([patch for members in windows.values() for patch in members]).argsort()
    groups = tuple((torch.tensor(members, device=device), length) for length, members in windows.items())
    return groups, back.to(device)


class PatchProjection(nn.Conv3d):
    """A convolution that sees each patch as a whole, once: a product, and in bf16 and fp16 computed as one.

    On a GPU, bf16 and some versions of cuDNN leave the convolution a kernel that goes through the patches one by one;
    with others its backward pass has none at all. On a CPU the product takes a fiftieth of the time in bf16.
    In fp32 it stays a convolution: there the order of the sum is the reference's, to the tolerance of its numbers.
    Source: huggingface/transformers#45750, pytorch/pytorch#166643.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Shapes: [N, 3, 2, 14, 14] in, a patch each; [N, C, 1, 1, 1] out."""
        if self.weight.dtype == torch.float32:
            return super().forward(input)
        return F.linear(input.flatten(1), self.weight.flatten(1), self.bias)[..., None, None, None]


def use_patch_product(visual: nn.Module) -> None:
    """The tower multiplies its patches. The class changes, the weights do not: nothing is initialised again."""
    visual.patch_embed.proj.__class__ = PatchProjection  # type: ignore[union-attr]


def use_grouped_attention(visual: nn.Module) -> None:
    """Every block of the tower groups its windows. The class changes, no weight does: nothing is initialised again."""
    for block in visual.blocks:  # type: ignore[union-attr]
        block.attn.__class__ = GroupedVisionAttention


def plan_vision(visual: nn.Module, image_grid_thw: Tensor, device: torch.device) -> dict[str, Any]:
    """What the tower would work out from the grid for every batch, as keyword arguments of get_image_features.

    Each tensor is on the device that its kernels need, wherever the grid is.
    """
    config: Any = visual.config
    grid = tuple(tuple(row) for row in image_grid_thw.tolist())
    sizes = (visual.spatial_merge_size, visual.window_size, visual.patch_size)
    return dict(_plan_vision(grid, sizes, device, is_flash=is_flash_attention_requested(config)))


@lru_cache(maxsize=PLANS_KEPT)
def _plan_vision(
    grid: tuple[tuple[int, ...], ...], sizes: tuple[int, int, int], device: torch.device, *, is_flash: bool
) -> dict[str, Any]:
    grid_thw = torch.tensor(grid)
    merge_size, window_size, patch_size = sizes
    window_index, cu_window_seqlens = get_vision_window_index(
        grid_thw, spatial_merge_size=merge_size, window_size=window_size, patch_size=patch_size
    )
    cu_seqlens = get_vision_cu_seqlens(grid_thw)
    plan = {
        "image_position_ids": get_vision_position_ids(grid_thw, merge_size).to(device),
        "image_window_index": window_index.to(device),
    }
    if not is_flash:
        # Lengths stay on the host: kernels take them as shapes.
        return plan | {"image_cu_seqlens": cu_seqlens, "image_cu_window_seqlens": cu_window_seqlens}
    # Flash attention's kernel reads them itself; the host passes only the longest.
    return plan | {
        "image_cu_seqlens": cu_seqlens.to(device),
        "image_cu_window_seqlens": cu_window_seqlens.to(device),
        "image_max_seqlen": int(cu_seqlens.diff().max()),
        "image_max_window_seqlen": int(cu_window_seqlens.diff().max()),
    }
