"""The exact text of prompt and target. A checkpoint is bound to it: change a blank and it is another model's prompt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from janus_cluster.janusvln.data.samples import ACTIONS, Sample

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

# What upstream asks for where there are no descriptions; its lines begin with a blank.
ACTION_TASK = "You should take one of the following actions:\n MOVE_FORWARD\n TURN_LEFT\n TURN_RIGHT\n STOP."


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


def render_user_parts(instruction: str, *, num_history: int, four_parts: bool = True) -> tuple[str, ...]:
    """The user's text cut at the images: image i is between part i and part i + 1.

    Asks for the four parts as the predecessor does, or for the action alone as upstream does: upstream removes the line
    end behind an image.
    Returns: num_history + 2 parts; the ones between two history images are empty. Without history the first part runs
    on to the current image.
    """
    line = "\n" if four_parts else "\n "
    before_history = f"{ROLE}{line}This is your historical observation:"
    before_current = f"{line}This is your current observation:"
    after = f"{line}Your task is to {instruction}{line}{TASK if four_parts else ACTION_TASK}"
    parts: tuple[str, ...] = (before_history, *[""] * (num_history - 1), before_current, after)
    if num_history == 0:
        parts = (before_history + before_current, after)
    return parts if four_parts else _without_line_ends(parts)


def render_prompt_parts(instruction: str, *, num_history: int, four_parts: bool = True) -> tuple[str, ...]:
    """The whole conversation up to the assistant's first token, cut at the images."""
    return _with_turns(render_user_parts(instruction, num_history=num_history, four_parts=four_parts))


def render_conversation(sample: Sample) -> tuple[str, ...]:
    """The sample's conversation up to the assistant's first token, cut at its frames: one part more than frames."""
    return _with_turns(_user_parts(sample, num_history=len(sample.frames) - 1))


def render_target_parts(sample: Sample) -> tuple[TargetPart, ...]:
    """The assistant's turn in stretches that tokenise apart as they do together: each begins after a line's end.

    Four parts, or the plain action where the sample has no descriptions.
    """
    closing = TargetPart("<|im_end|>\n", Segment.ACTION, closing=True)
    if not sample.has_four_parts:
        return (TargetPart(ACTIONS[sample.action], Segment.ACTION), closing)
    return (
        TargetPart(f"SUBINSTRUCTION: {sample.subinstruction}\n", Segment.SUBINSTRUCTION),
        TargetPart(f"2D_DESCRIPTION: {sample.description_2d}\n", Segment.DESCRIPTION_2D),
        TargetPart(f"3D_DESCRIPTION: {sample.description_3d}\n", Segment.DESCRIPTION_3D),
        TargetPart(f"ACTION: {ACTIONS[sample.action]}", Segment.ACTION),
        closing,
    )


def sample_texts(samples: Iterable[Sample]) -> list[str]:
    """The distinct prompts and targets of the samples, sorted: what a tiny tokenizer is trained on."""
    texts = set()
    for sample in samples:
        texts.add("".join(_user_parts(sample, num_history=1)))
        texts.add("".join(part.text for part in render_target_parts(sample) if not part.closing))
    return sorted(texts)


def _user_parts(sample: Sample, *, num_history: int) -> tuple[str, ...]:
    if sample.user_parts is not None:
        return _without_line_ends(sample.user_parts)
    return render_user_parts(sample.instruction, num_history=num_history, four_parts=sample.has_four_parts)


def _without_line_ends(parts: tuple[str, ...]) -> tuple[str, ...]:
    """The parts as upstream tokenises them: without the line end that follows an image."""
    return (parts[0], *(part.removeprefix("\n") for part in parts[1:]))


def _with_turns(user_parts: tuple[str, ...]) -> tuple[str, ...]:
    first, *rest = user_parts
    head = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{first}"
    tail = f"{rest[-1]}<|im_end|>\n<|im_start|>assistant\n"
    return (head, *rest[:-1], tail)
