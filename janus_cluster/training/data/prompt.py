"""The exact text of prompt and target. A checkpoint is bound to it: change a blank and it is another model's prompt."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from janus_cluster.training.data.samples import ACTIONS, Sample

SYSTEM = "You are a helpful assistant."
ROLE = (
    "You are a visual language navigation model, and your should go to the locations to complete the given task. "
    "Compare the observation and instruction to infer your current progress, and then select the correct direction "
    "from the candidates to go to the target location and finish the task."
)
TASK = (
    "First, predict the subinstruction for the current view. Then describe the view in 2D and 3D. "
    "Finally, choose one of the following actions:\n"
    "MOVE_FORWARD\nTURN_LEFT\nTURN_RIGHT\nSTOP.\n"
    "Respond in the following format:\n"
    "SUBINSTRUCTION: ...\n2D_DESCRIPTION: ...\n3D_DESCRIPTION: ...\nACTION: ..."
)


class Segment(IntEnum):
    """Which part of the target a token belongs to."""

    NONE = 0
    SUBINSTRUCTION = 1
    DESCRIPTION_2D = 2
    DESCRIPTION_3D = 3
    ACTION = 4


@dataclass(frozen=True, slots=True)
class TargetPart:
    """A stretch of the target. `closing` is the end of the turn: it counts to the action, but weighs 1."""

    text: str
    segment: Segment
    closing: bool = False


def render_user_parts(instruction: str, *, num_history: int) -> tuple[str, ...]:
    """The user's text cut at the images: image i stands between part i and part i + 1.

    Returns: num_history + 2 parts; the ones between two history images are empty. Without history the first part runs
    on to the current image.
    """
    before_history = f"{ROLE}\nThis is your historical observation:"
    before_current = "\nThis is your current observation:"
    after = f"\nYour task is to {instruction}\n{TASK}"
    if num_history == 0:
        return (before_history + before_current, after)
    return (before_history, *[""] * (num_history - 1), before_current, after)


def render_prompt_parts(instruction: str, *, num_history: int) -> tuple[str, ...]:
    """The whole conversation up to the assistant's first word, cut at the images."""
    first, *rest = render_user_parts(instruction, num_history=num_history)
    head = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{first}"
    tail = f"{rest[-1]}<|im_end|>\n<|im_start|>assistant\n"
    return (head, *rest[:-1], tail)


def render_target_parts(sample: Sample) -> tuple[TargetPart, ...]:
    """The assistant's turn in stretches that tokenise apart as they do together: each begins after a line's end."""
    return (
        TargetPart(f"SUBINSTRUCTION: {sample.subinstruction}\n", Segment.SUBINSTRUCTION),
        TargetPart(f"2D_DESCRIPTION: {sample.description_2d}\n", Segment.DESCRIPTION_2D),
        TargetPart(f"3D_DESCRIPTION: {sample.description_3d}\n", Segment.DESCRIPTION_3D),
        TargetPart(f"ACTION: {ACTIONS[sample.action]}", Segment.ACTION),
        TargetPart("<|im_end|>\n", Segment.ACTION, closing=True),
    )


def sample_texts(samples: list[Sample] | tuple[Sample, ...]) -> list[str]:
    """The distinct prompts and targets of the samples, sorted: what a tiny tokenizer is trained on."""
    texts = set()
    for sample in samples:
        texts.add("".join(render_user_parts(sample.instruction, num_history=1)))
        texts.add("".join(part.text for part in render_target_parts(sample) if not part.closing))
    return sorted(texts)
