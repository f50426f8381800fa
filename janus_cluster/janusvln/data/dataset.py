"""Samples as tensors, and batches of them.

Legend: B samples of a batch, L tokens of the longest, S frames of one sample, H × W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from janus_cluster.errors import TrainingFailed
from janus_cluster.janusvln.data.encode import Encoded, SampleEncoder
from janus_cluster.janusvln.data.images import load_frames
from janus_cluster.janusvln.data.samples import Sample
from janus_cluster.janusvln.loss import IGNORE_INDEX
from janus_cluster.job.schema import Data, SegmentWeights
from janus_cluster.modelspec.frames import Grid, qwen_grid

# Padding behind the end of a shorter sample; input_ids get the tokenizer's pad token.
PADDING: dict[str, float] = {
    "mm_token_type_ids": 0,
    "labels": IGNORE_INDEX,
    "loss_weights": 0.0,
    "segment_ids": 0,
}


class NavigationDataset(Dataset[dict[str, Any]]):
    """Samples, decoded and tokenised when they are asked for; safe in loader workers."""

    def __init__(
        self, samples: Sequence[Sample], *, tokenizer: Any, data: Data, segment_weights: SegmentWeights
    ) -> None:
        self.samples = samples
        self._data = data
        self._encoder = SampleEncoder(tokenizer, segment_weights)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample: `collate`'s keys without the batch dimension, and `id`.

        Shapes:  frames [S, 3, H, W] uint8, image_grid_thw [S, 3], the others [L].
        Raises:  TrainingFailed naming the file or the sample that cannot be used.
        """
        sample = self.samples[index]
        frames = load_frames(sample.frames, self._data, sizes=sample.frame_sizes)
        grid = qwen_grid(frames.shape[3], frames.shape[2])
        sample, encoded = self._encode_within_limit(sample, grid)
        frames = frames[-len(sample.frames) :]
        return {
            "id": sample.id,
            "input_ids": torch.from_numpy(encoded.input_ids),
            "mm_token_type_ids": torch.from_numpy(encoded.mm_token_type_ids),
            "labels": torch.from_numpy(encoded.labels),
            "loss_weights": torch.from_numpy(encoded.loss_weights),
            "segment_ids": torch.from_numpy(encoded.segment_ids),
            "action": sample.action,
            "frames": torch.from_numpy(frames),
            "image_grid_thw": torch.tensor([grid] * len(frames), dtype=torch.int64),
        }

    def _encode_within_limit(self, sample: Sample, grid: Grid) -> tuple[Sample, Encoded]:
        """The sample and its tokens; with on_too_long shorten_history, with as much history as fits."""
        limit = self._data.max_length
        encoded = self._encoder.encode(sample, [grid] * len(sample.frames))
        while len(encoded.input_ids) > limit and self._data.on_too_long == "shorten_history" and len(sample.frames) > 1:
            sample = sample.without_oldest_frame()
            encoded = self._encoder.encode(sample, [grid] * len(sample.frames))
        if len(encoded.input_ids) > limit:
            raise TrainingFailed(
                f"sample {sample.id} has {len(encoded.input_ids)} tokens, data.max_length is {limit}",
                hint="raise data.max_length, or lower data.history or data.image_width; a sample is never cut",
                kind="bad_data",
            )
        return sample, encoded


def collate(samples: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """One batch, padded on the right.

    Shapes:  input_ids, attention_mask, mm_token_type_ids, labels, loss_weights (float32), segment_ids [B, L];
             actions [B]; frames: B tensors [S, 3, H, W] uint8; image_grid_thw [sum of S, 3].
    """
    ids = [sample["input_ids"] for sample in samples]
    batch: dict[str, Any] = {
        "input_ids": pad_right(ids, pad_token_id),
        "attention_mask": pad_right([torch.ones_like(row) for row in ids], 0),
    }
    for key, value in PADDING.items():
        batch[key] = pad_right([sample[key] for sample in samples], value)
    batch["actions"] = torch.tensor([sample["action"] for sample in samples], dtype=torch.int64)
    batch["frames"] = [sample["frames"] for sample in samples]
    batch["image_grid_thw"] = torch.cat([sample["image_grid_thw"] for sample in samples])
    return batch


def pad_right(rows: Sequence[torch.Tensor], value: float) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
