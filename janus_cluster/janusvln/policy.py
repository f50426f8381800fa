"""A trained model as a policy: of every episode that goes on, one frame in and one action out, all in one batch.

A step shows the model what a training sample of that moment would: the frames that history_positions names, prepared
alike, and the same prompt. So its answers are those of the evaluation on the same frames.
Legend: B episodes, S frames of one, L positions, A actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from janus_cluster.errors import UsageError
from janus_cluster.janusvln.data.dataset import pad_right
from janus_cluster.janusvln.data.encode import SampleEncoder
from janus_cluster.janusvln.data.history import history_positions
from janus_cluster.janusvln.data.images import prepare_image
from janus_cluster.janusvln.data.samples import ACTIONS, Sample
from janus_cluster.janusvln.model.generate import generate_text
from janus_cluster.janusvln.model.janus import JanusModel
from janus_cluster.janusvln.scores import parse_answer
from janus_cluster.job.schema import Data, SegmentWeights
from janus_cluster.modelspec.frames import qwen_grid


@dataclass(slots=True)
class EpisodeMemory:
    """One episode so far. Its frames are kept resized, uint8: 0.9 MB each at 644×490."""

    instruction: str
    frames: list[NDArray[np.uint8]] = field(default_factory=list)


class ModelPolicy:
    """The action head's choice, or the action that the model's answer in words names."""

    def __init__(
        self,
        model: JanusModel,
        *,
        tokenizer: Any,
        data: Data,
        pad_history: bool,
        four_parts: bool,
        max_new_tokens: int | None = None,
    ) -> None:
        """four_parts: whether the prompt asks for descriptions too, as that of the training data did.

        max_new_tokens: of an answer in words; None: the action head chooses.
        """
        self._model, self._data, self._pad_history = model.eval(), data, pad_history
        self._tokenizer, self._four_parts, self._max_new_tokens = tokenizer, four_parts, max_new_tokens
        self._pad_token_id = int(tokenizer.pad_token_id)
        self._encoder = SampleEncoder(tokenizer, SegmentWeights())

    def see(self, memory: EpisodeMemory, frame_HW3: NDArray[np.uint8]) -> None:
        """The frame is the episode's newest. Raises: UsageError if it has another size than those before it."""
        prepared = prepare_image(Image.fromarray(frame_HW3), self._data)
        if memory.frames and prepared.shape != memory.frames[0].shape:
            raise UsageError(f"a frame of {prepared.shape[2]}×{prepared.shape[1]} follows frames of another size")
        memory.frames.append(prepared)

    def action_probabilities(self, memories: Sequence[EpisodeMemory]) -> Tensor:
        """Of each episode, for the frame it saw last. Shapes: [B, A] fp32, in the order of ACTIONS."""
        shown = [self._shown_frames(memory) for memory in memories]
        ids = [self._prompt_ids(memory, frames) for memory, frames in zip(memories, shown, strict=True)]
        device = self._model.device
        batch = {
            "input_ids": pad_right(ids, self._pad_token_id),
            "attention_mask": pad_right([torch.ones_like(row) for row in ids], 0),
            "image_grid_thw": torch.tensor([_grid(frames) for frames in shown for _ in frames]),
        }
        with torch.no_grad():
            output = self._model(
                **{key: value.to(device) for key, value in batch.items()},
                frames=[torch.from_numpy(frames).to(device) for frames in shown],
            )
        return output.action_logits.softmax(-1).cpu()  # type: ignore[no-any-return]

    def act(self, memories: Sequence[EpisodeMemory]) -> list[str]:
        """An action for each episode. An answer in words that names none counts as STOP: the model is lost."""
        if self._max_new_tokens is not None:
            return [self._answer(memory, self._max_new_tokens) for memory in memories]
        return [ACTIONS[i] for i in self.action_probabilities(memories).argmax(-1).tolist()]

    def _answer(self, memory: EpisodeMemory, max_new_tokens: int) -> str:
        frames = self._shown_frames(memory)
        ids = self._prompt_ids(memory, frames)
        text, _ = generate_text(
            self._model,
            self._tokenizer,
            input_ids_L=ids,
            mm_token_type_ids_L=(ids == self._model.config.image_token_id).long(),
            frames_S3HW=torch.from_numpy(frames),
            image_grid_thw=torch.tensor([_grid(frames)] * len(frames)),
            max_new_tokens=max_new_tokens,
        )
        label = parse_answer(text, four_parts=self._four_parts)
        return "STOP" if label is None else ACTIONS[label]

    def _shown_frames(self, memory: EpisodeMemory) -> NDArray[np.uint8]:
        """[S, 3, H, W], oldest first."""
        positions = history_positions(len(memory.frames) - 1, self._data.history, pad=self._pad_history)
        return np.stack([memory.frames[i] for i in positions])

    def _prompt_ids(self, memory: EpisodeMemory, frames_S3HW: NDArray[np.uint8]) -> Tensor:
        sample = Sample(
            id="",
            episode="",
            instruction=memory.instruction,
            subinstruction="",
            description_2d="?" if self._four_parts else "",
            description_3d="",
            action=0,
            frames=(Path(),) * len(frames_S3HW),
        )
        return torch.tensor(self._encoder.encode_prompt(sample, [_grid(frames_S3HW)] * len(frames_S3HW)))


def _grid(frames_S3HW: NDArray[np.uint8]) -> tuple[int, int, int]:
    return qwen_grid(frames_S3HW.shape[3], frames_S3HW.shape[2])
