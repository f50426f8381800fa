"""VGGT's aggregator as a frozen spatial memory: all frames of one sample in one pass.

Shape legend: S frames (oldest first), N tokens a frame = T special (camera, registers) + P patches, C width, H heads,
D head width.

DINOv2-with-registers gives the patch tokens; then frame blocks (attention inside a frame) and global blocks (attention
over frames) alternate. A frame sees itself and the frames before it, so the pass equals feeding frames one by one.
Source: VGGT (arXiv 2503.11651), JanusVLN (arXiv 2509.22548).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from janus_cluster.janusvln.model.pixels import per_channel
from janus_cluster.modelspec.networks import VggtConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# The published code builds the blocks with torch's default LayerNorm, DINOv2 with 1e-6; mixing them up costs 2e-3.
BLOCK_NORM_EPS = 1e-5
DINO_NORM_EPS = 1e-6
ROPE_TABLES_KEPT = 16

RopeTable = tuple[Tensor, Tensor]


def build_rope_table(config: VggtConfig, *, grid_h: int, grid_w: int, device: torch.device) -> RopeTable:
    """cos and sin of the 2D rotary embedding for one frame's tokens, fp32.

    The first half of a head turns with the row, the second with the column. Patches count from 1; special tokens sit
    at 0.
    Returns: two tensors [N, D].
    """
    half = config.embed_dim // config.num_heads // 2
    exponents = torch.arange(0, half, 2, device=device, dtype=torch.float32) / half
    frequencies = 1.0 / config.rope_base**exponents
    rows = torch.arange(1, grid_h + 1, device=device, dtype=torch.float32).repeat_interleave(grid_w)
    columns = torch.arange(1, grid_w + 1, device=device, dtype=torch.float32).repeat(grid_h)
    positions_N2 = F.pad(torch.stack((rows, columns), dim=-1), (0, 0, config.num_special_tokens, 0))
    angles_N2F = positions_N2[:, :, None] * frequencies
    angles_ND = torch.cat((angles_N2F, angles_N2F), dim=-1).flatten(1)
    return angles_ND.cos(), angles_ND.sin()


def rotate(x_SHND: Tensor, rope: RopeTable) -> Tensor:
    """x turned by its tokens' row (first half of the head) and column (second half)."""
    cos, sin = rope
    a, b = x_SHND.reshape(*x_SHND.shape[:-1], 2, 2, -1).unbind(-2)
    turned = torch.stack((-b, a), dim=-2).flatten(-3)
    return x_SHND * cos + turned * sin


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys and 2D rotary positions."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(head_dim, eps=BLOCK_NORM_EPS)
        self.k_norm = nn.LayerNorm(head_dim, eps=BLOCK_NORM_EPS)
        self.proj = nn.Linear(dim, dim)

    def project(self, x_SNC: Tensor, rope: RopeTable) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [S, H, N, D]; queries and keys normalised and turned."""
        qkv = self.qkv(x_SNC).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return rotate(self.q_norm(q), rope).to(v.dtype), rotate(self.k_norm(k), rope).to(v.dtype), v

    def merge_heads(self, mixed_SHND: Tensor) -> Tensor:
        return self.proj(mixed_SHND.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def attend_to_earlier_frames(q_FHND: Tensor, k_SHND: Tensor, v_SHND: Tensor) -> Tensor:
    """Each frame's queries over the keys of that frame and of all before it; q holds the last F of the S frames.

    One unmasked call per frame: exact, no mask in memory, nothing computed that the mask would throw away.
    """
    num_queries, num_frames, num_tokens = q_FHND.shape[0], k_SHND.shape[0], k_SHND.shape[2]
    k_all = k_SHND.transpose(0, 1).flatten(1, 2)[None]
    v_all = v_SHND.transpose(0, 1).flatten(1, 2)[None]
    mixed = []
    for i in range(num_queries):
        seen = (num_frames - num_queries + i + 1) * num_tokens
        mixed.append(F.scaled_dot_product_attention(q_FHND[i : i + 1], k_all[:, :, :seen], v_all[:, :, :seen]))
    return torch.cat(mixed)


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One pre-norm transformer block; its attention stays inside a frame or runs over the frames so far."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int, *, over_frames: bool) -> None:
        super().__init__()
        self.over_frames = over_frames
        self.norm1 = nn.LayerNorm(dim, eps=BLOCK_NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=BLOCK_NORM_EPS)
        self.mlp = Mlp(dim, mlp_ratio * dim)
        self.ls2 = LayerScale(dim)

    def forward(self, x_SNC: Tensor, rope: RopeTable, *, last_frame_only: bool = False) -> Tensor:
        """Shapes: [S, N, C] in; [S, N, C] out, or [1, N, C] where only the last frame is wanted."""
        q, k, v = self.attn.project(self.norm1(x_SNC), rope)
        if last_frame_only:
            q, x_SNC = q[-1:], x_SNC[-1:]
        mixed = attend_to_earlier_frames(q, k, v) if self.over_frames else F.scaled_dot_product_attention(q, k, v)
        return self.add_to_stream(x_SNC, mixed)

    def add_to_stream(self, x_SNC: Tensor, mixed_SHND: Tensor) -> Tensor:
        """The residual stream after attention's result and the MLP."""
        x = x_SNC + self.ls1(self.attn.merge_heads(mixed_SHND))
        return x + self.ls2(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


class Aggregator(nn.Module):
    """VGGT's aggregator up to its last layer but one, frozen, in evaluation mode.

    The last frame block and the last global block do not exist here: the memory is the layer before them.
    """

    def __init__(self, config: VggtConfig) -> None:
        super().__init__()
        self.config = config
        c, num_blocks = config.embed_dim, config.depth - 1
        self.patch_embed = Dinov2WithRegistersModel(_dino_config(config))
        self.camera_token = nn.Parameter(torch.randn(1, 2, 1, c) * 0.02)
        self.register_token = nn.Parameter(torch.randn(1, 2, config.num_register_tokens, c) * 0.02)
        sizes = (c, config.num_heads, config.mlp_ratio)
        self.frame_blocks = nn.ModuleList(Block(*sizes, over_frames=False) for _ in range(num_blocks))
        self.global_blocks = nn.ModuleList(Block(*sizes, over_frames=True) for _ in range(num_blocks))
        self._rope_tables: dict[tuple[int, int, torch.device, torch.dtype], RopeTable] = {}
        self.requires_grad_(False)
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.camera_token.device

    @property
    def dtype(self) -> torch.dtype:
        return self.camera_token.dtype

    @torch.no_grad()
    def forward(self, frames_S3HW: Tensor) -> Tensor:
        """The spatial memory of the last frame: features of its patches.

        Shapes:  frames [S, 3, H, W] in [0, 1], oldest first, H and W multiples of the patch size.
        Returns: [H / patch, W / patch, 2C] = frame block's output beside the global block's.
        """
        grid_h, grid_w = (side // self.config.patch_size for side in frames_S3HW.shape[-2:])
        rope = self.rope_table(grid_h, grid_w)
        x = self.with_special_tokens(self.patch_tokens(frames_S3HW))
        last = len(self.frame_blocks) - 1
        for i, (frame_block, global_block) in enumerate(self.block_pairs()):
            in_frame = frame_block(x, rope)
            x = global_block(in_frame, rope, last_frame_only=i == last)
        return self.feature_map(in_frame[-1], x[-1], grid_h=grid_h, grid_w=grid_w)

    def feature_map(self, in_frame_NC: Tensor, over_frames_NC: Tensor, *, grid_h: int, grid_w: int) -> Tensor:
        """[grid_h, grid_w, 2C]: the patches of one frame, the outputs of both last blocks side by side."""
        features = torch.cat((in_frame_NC, over_frames_NC), dim=-1)[self.config.num_special_tokens :]
        return features.reshape(grid_h, grid_w, -1)

    def block_pairs(self) -> Iterator[tuple[Block, Block]]:
        """Frame block and global block of every layer, in order."""
        for frame_block, global_block in zip(self.frame_blocks, self.global_blocks, strict=True):
            yield cast(Block, frame_block), cast(Block, global_block)

    @torch.no_grad()
    def patch_tokens(self, frames_S3HW: Tensor) -> Tensor:
        """DINOv2's normalised patch tokens [S, P, C] of frames in [0, 1]."""
        mean = per_channel(IMAGENET_MEAN, frames_S3HW.device)
        std = per_channel(IMAGENET_STD, frames_S3HW.device)
        tokens = self.patch_embed(((frames_S3HW - mean) / std).to(self.dtype)).last_hidden_state
        return tokens[:, self.config.num_special_tokens :]  # type: ignore[no-any-return]

    def with_special_tokens(self, patches_SPC: Tensor, *, first_index: int = 0) -> Tensor:
        """[S, N, C]: camera and register tokens in front; frame 0 has its own, all later ones share theirs.

        `first_index` is the place of patches_SPC[0] in its sequence.
        """
        special_2TC = torch.cat((self.camera_token, self.register_token), dim=2)[0]
        num_first = 1 if first_index == 0 else 0
        later = special_2TC[1:].expand(patches_SPC.shape[0] - num_first, -1, -1)
        return torch.cat((torch.cat((special_2TC[:num_first], later)), patches_SPC), dim=1)

    def rope_table(self, grid_h: int, grid_w: int) -> RopeTable:
        """The cached table: computed once per grid, so a step launches no kernels for it and waits for no device."""
        key = (grid_h, grid_w, self.device, self.dtype)
        if key not in self._rope_tables:
            if len(self._rope_tables) >= ROPE_TABLES_KEPT:
                self._rope_tables.pop(next(iter(self._rope_tables)))
            cos, sin = build_rope_table(self.config, grid_h=grid_h, grid_w=grid_w, device=self.device)
            self._rope_tables[key] = (cos.to(self.dtype), sin.to(self.dtype))
        return self._rope_tables[key]


def _dino_config(config: VggtConfig) -> Dinov2WithRegistersConfig:
    return Dinov2WithRegistersConfig(
        hidden_size=config.embed_dim,
        num_hidden_layers=config.dino_depth,
        num_attention_heads=config.dino_num_heads,
        mlp_ratio=config.mlp_ratio,
        image_size=config.dino_image_size,
        patch_size=config.patch_size,
        num_register_tokens=config.num_register_tokens,
        layer_norm_eps=DINO_NORM_EPS,
        hidden_act="gelu",
        use_swiglu_ffn=False,
    )
