"""The spatial memory of an episode that is still going on: one new frame at a time, bounded memory.

Shape legend: N tokens a frame, H heads, D head width, C width of VGGT.

Every global block keeps the keys and values of the first frames and of the most recent ones; a new frame sees those
and itself. No key holds its frame's time, so dropping a frame from the middle needs no renumbering.
Source: JanusVLN (arXiv 2509.22548): initial frames and a sliding window.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from janus_cluster.janusvln.model.vggt import Aggregator

FIRST_FRAMES = 8
RECENT_FRAMES = 48


class _FrameCache:
    """Keys and values of one block, a slot a frame; the storage doubles until it holds `max_frames`."""

    def __init__(self, max_frames: int) -> None:
        self._max_frames = max_frames
        self._storage_2HMD: Tensor | None = None
        self._held = 0

    @property
    def num_bytes(self) -> int:
        return 0 if self._storage_2HMD is None else self._storage_2HMD.nbytes

    def put(self, slot: int, k_1HND: Tensor, v_1HND: Tensor) -> tuple[Tensor, Tensor]:
        """Slot `slot` holds this frame; returned are all keys and values held, [1, H, M, D]."""
        num_tokens = k_1HND.shape[2]
        self._held = max(self._held, slot + 1)
        storage = self._storage_2HMD
        if storage is None or storage.shape[2] < self._held * num_tokens:
            frames = min(self._max_frames, max(self._held, 2 * (self._held - 1)))
            grown = k_1HND.new_empty(2, k_1HND.shape[1], frames * num_tokens, k_1HND.shape[3])
            if storage is not None:
                grown[:, :, : storage.shape[2]] = storage
            self._storage_2HMD = storage = grown
        tokens = slice(slot * num_tokens, (slot + 1) * num_tokens)
        storage[0, :, tokens], storage[1, :, tokens] = k_1HND[0], v_1HND[0]
        held = storage[:, :, : self._held * num_tokens]
        return held[:1], held[1:]


class StreamingMemory:
    """What an aggregator remembers of the frames so far; `append` gives the newest frame's features.

    Equal to one pass over all frames while there are at most first + recent + 1 of them.
    Memory: 2·C values a token, frame and global block; VGGT-1B, 644×490, bf16: 152 MB a frame, 8.7 GB when full.
    """

    def __init__(self, aggregator: Aggregator, *, first: int = FIRST_FRAMES, recent: int = RECENT_FRAMES) -> None:
        if first < 0 or recent < 0:
            raise ValueError(f"first {first} and recent {recent} count frames; they cannot be negative")
        self._aggregator = aggregator
        self._first, self._recent = first, recent
        self.reset()

    def reset(self) -> None:
        """Nothing is remembered: the next frame is the first of an episode."""
        self.num_frames = 0
        self._frame_size: tuple[int, int] | None = None
        self._caches = [_FrameCache(self._first + self._recent + 1) for _ in self._aggregator.global_blocks]

    @property
    def num_bytes(self) -> int:
        """Bytes that the kept keys and values take."""
        return sum(cache.num_bytes for cache in self._caches)

    @torch.no_grad()
    def append(self, frame_3HW: Tensor) -> Tensor:
        """The spatial memory of `frame_3HW` after everything before it.

        Shapes:  [3, H, W] in [0, 1]; [H / patch, W / patch, 2C] out.
        Raises:  ValueError if the frame has another size than those before it.
        """
        aggregator = self._aggregator
        size = (frame_3HW.shape[-2], frame_3HW.shape[-1])
        if self._frame_size not in (None, size):
            raise ValueError(f"a frame of {size} follows frames of {self._frame_size}; reset() begins a new episode")
        self._frame_size = size
        grid_h, grid_w = (side // aggregator.config.patch_size for side in size)
        rope = aggregator.rope_table(grid_h, grid_w)
        patches = aggregator.patch_tokens(frame_3HW[None])
        x = aggregator.with_special_tokens(patches, first_index=self.num_frames)
        slot = self._slot(self.num_frames)
        for (frame_block, global_block), cache in zip(aggregator.block_pairs(), self._caches, strict=True):
            in_frame = frame_block(x, rope)
            q, k, v = global_block.attn.project(global_block.norm1(in_frame), rope)
            x = global_block.add_to_stream(in_frame, F.scaled_dot_product_attention(q, *cache.put(slot, k, v)))
        self.num_frames += 1
        return aggregator.feature_map(in_frame[0], x[0], grid_h=grid_h, grid_w=grid_w)

    def _slot(self, index: int) -> int:
        """The first frames keep their slots; the newest takes that of the one before the last `recent`."""
        if index < self._first:
            return index
        return self._first + (index - self._first) % (self._recent + 1)
