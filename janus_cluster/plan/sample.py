"""How many tokens and patches one sample has, from the data section and the camera's size alone."""

from __future__ import annotations

from dataclasses import dataclass

from janus_cluster.errors import UsageError
from janus_cluster.job.schema import Data
from janus_cluster.modelspec.frames import PATCH, frame_shape, qwen_grid

MARKS = 2  # <|vision_start|> and <|vision_end|> around each image
# Habitat's frames, as R2R and ScaleVLN walks are rendered.
CAMERA = (640, 480)
# Of a four-part sample of Qwen's tokenizer, without images: 3,909 tokens in all at 9 frames of 391 + 2, ~160 of them
# labels (docs/performance.md).
TEXT_TOKENS = 372
LABEL_TOKENS = 160


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample with its whole history; `rows` and `columns` are Qwen's patches, `vggt_patches` VGGT's, per frame."""

    frames: int
    width: int
    height: int
    rows: int
    columns: int
    vggt_patches: int
    text_tokens: int
    label_tokens: int

    @property
    def vision_patches(self) -> int:
        return self.frames * self.rows * self.columns

    @property
    def memory_tokens(self) -> int:
        """Tokens of one image, and of the spatial memory that is added to them."""
        return self.rows * self.columns // 4

    @property
    def image_tokens(self) -> int:
        return self.frames * self.memory_tokens

    @property
    def tokens(self) -> int:
        return self.image_tokens + self.frames * MARKS + self.text_tokens


def plan_sample(
    data: Data,
    *,
    camera: tuple[int, int] = CAMERA,
    text_tokens: int = TEXT_TOKENS,
    label_tokens: int = LABEL_TOKENS,
) -> Sample:
    """The longest sample that `data` makes of a camera's frames: early in an episode there are fewer frames.

    Raises: UsageError if it has more tokens than data.max_length allows.
    """
    width, height = frame_shape(*camera, data)
    _, rows, columns = qwen_grid(width, height)
    sample = Sample(
        frames=data.history + 1,
        width=width,
        height=height,
        rows=rows,
        columns=columns,
        vggt_patches=(height // PATCH) * (width // PATCH),
        text_tokens=text_tokens,
        label_tokens=label_tokens,
    )
    if sample.tokens > data.max_length and data.on_too_long == "fail":
        raise UsageError(
            f"data.max_length: {data.max_length}: a sample of {sample.frames} frames of {sample.memory_tokens} tokens "
            f"has about {sample.tokens}",
            hint=f"--set data.max_length={sample.tokens + text_tokens}, or lower data.history or data.image_width",
        )
    return sample
