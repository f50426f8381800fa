"""Text and image grids -> ids, labels, loss weights and segment ids, without a search for where the answer begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_cluster.janusvln.data.prompt import Segment, render_conversation, render_target_parts
from janus_cluster.janusvln.data.samples import Sample
from janus_cluster.janusvln.data.tokenizer import image_token_ids
from janus_cluster.janusvln.data.usable import MERGE_LENGTH
from janus_cluster.janusvln.loss import IGNORE_INDEX
from janus_cluster.job.schema import SegmentWeights
from janus_cluster.modelspec.frames import Grid


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """One sample as arrays of its length L. `loss_weights` are at the label's own position."""

    input_ids: NDArray[np.int64]
    mm_token_type_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    loss_weights: NDArray[np.float32]
    segment_ids: NDArray[np.int64]


class SampleEncoder:
    """Encodes samples with one tokenizer and one set of segment weights; loader workers may hold it."""

    def __init__(self, tokenizer: Any, segment_weights: SegmentWeights) -> None:
        self._tokenizer = tokenizer
        self._images = image_token_ids(tokenizer)
        self._weights = {
            Segment.SUBINSTRUCTION: segment_weights.subinstruction,
            Segment.DESCRIPTION_2D: segment_weights.description_2d,
            Segment.DESCRIPTION_3D: segment_weights.description_3d,
            Segment.ACTION: segment_weights.action,
        }

    def encode(self, sample: Sample, grids: Sequence[Grid]) -> Encoded:
        """The sample's conversation as ids; each of its frames is expanded to its grid's number of tokens.

        Prompt and target parts are tokenised one by one. Their borders (control tokens, line ends before a letter or a
        digit) are borders for Qwen's pre-tokenizer too, so the ids are those of the whole text.
        """
        ids = self.encode_prompt(sample, grids)
        prompt_length = len(ids)
        weights: list[float] = [0.0] * prompt_length
        segments: list[int] = [int(Segment.NONE)] * prompt_length
        for part in render_target_parts(sample):
            part_ids = self._tokenize(part.text)
            ids += part_ids
            weights += [1.0 if part.closing else self._weights[part.segment]] * len(part_ids)
            segments += [int(part.segment)] * len(part_ids)
        input_ids = np.array(ids, dtype=np.int64)
        labels = input_ids.copy()
        labels[:prompt_length] = IGNORE_INDEX
        return Encoded(
            input_ids=input_ids,
            mm_token_type_ids=(input_ids == self._images.image_pad).astype(np.int64),
            labels=labels,
            loss_weights=np.array(weights, dtype=np.float32),
            segment_ids=np.array(segments, dtype=np.int64),
        )

    def encode_prompt(self, sample: Sample, grids: Sequence[Grid]) -> list[int]:
        """The ids before the target: of a sample whose action is still to be chosen, all there are."""
        first, *rest = render_conversation(sample)
        ids = self._tokenize(first)
        for (_, grid_h, grid_w), text in zip(grids, rest, strict=True):
            pads = [self._images.image_pad] * (grid_h * grid_w // MERGE_LENGTH)
            ids += [self._images.vision_start, *pads, self._images.vision_end]
            ids += self._tokenize(text)
        return ids

    def _tokenize(self, text: str) -> list[int]:
        if not text:
            return []
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids
